"""Odd values that the table of ranges accepts really train; what it refuses is in tests/test_ranges.py."""

from pathlib import Path
from typing import Any

import pytest
from conftest import QUIET, Run, checkpoint
from omegaconf import OmegaConf

from ipa.ranges import range_of

# of every option the smallest value, a fraction, and a value that people type for "none" or "as much as there is"
ODD = [0, 0.5, 1, 1000]
OPTIONS = [
    "seed",
    "min_snr_gamma",
    "ema.decay",
    "data.batch_size",
    "data.num_workers",
    "data.window",
    "data.headroom",
    "data.drops.text",
    "optimizer.lr",
    "optimizer.weight_decay",
    "schedule.num_warmup_steps",
    "trainer.accumulate_grad_batches",
    "trainer.log_every_n_steps",
    "trainer.gradient_clip_val",
    "stop.grace_s",
    "guard.most_skips",
    "guard.stall_minutes",
    "preview.num_prompts",
    "preview.num_scored",
    "preview.every_n_steps",
    "scoring.num_prompts",
    "checkpoint.keep_last",
    "checkpoint.every_n_steps",
    "image_prompt_check.every_n_steps",
    "callbacks.buckets.num_buckets",
    "callbacks.progress.refresh_every_n_steps",
    "sampling.num_steps",
    "sampling.guidance",
    "sampling.guidance_rescale",
    "sampling.scale",
    "sampling.batch_size",
]
# a process each, a batch each; the drop rates sum to more than 1
LEFT_OUT = {("data.num_workers", 1000), ("trainer.accumulate_grad_batches", 1000), ("data.drops.text", 1)}


def accepted() -> list[Any]:
    found = []
    for option in OPTIONS:
        known = range_of(option)
        assert known is not None, option
        for value in ODD:
            try:
                known.read(value)
            except ValueError:
                continue
            if (option, value) not in LEFT_OUT:
                found.append(pytest.param(option, value, id=f"{option}={value}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("option", "value"), accepted())
def test_an_accepted_value_trains(train_in: Run, tmp_path: Path, option: str, value: Any) -> None:
    watched = option.startswith(("preview", "scoring", "sampling", "image_prompt"))
    folder = train_in(tmp_path / "x", "trainer.max_steps=2", *(() if watched else QUIET), f"++{option}={value}")

    assert checkpoint(folder)["global_step"] == 2
    assert (folder / "adapter.safetensors").is_file()
    assert OmegaConf.load(folder / "config.yaml")
