"""Odd values that the table of ranges accepts really train; what it refuses is in tests/test_ranges.py."""

from pathlib import Path
from typing import Any

import pytest
from conftest import QUIET, Run, checkpoint
from omegaconf import OmegaConf

from ipa.ranges import range_of

# of every option the smallest value, a fraction, and a value that people type for "none" or "as much as there is"
ODD = [0, 0.5, 1, 1000]
GROUPS = {
    "data": ("batch_size", "num_workers", "window", "headroom", "drops.text"),
    "optimizer": ("lr", "weight_decay"),
    "schedule": ("num_warmup_steps",),
    "trainer": ("accumulate_grad_batches", "log_every_n_steps", "gradient_clip_val"),
    "guard": ("most_skips", "stall_minutes"),
    "preview": ("num_prompts", "num_scored", "every_n_steps"),
    "checkpoint": ("keep_last", "every_n_steps"),
    "sampling": ("num_steps", "guidance", "guidance_rescale", "scale", "batch_size"),
    "callbacks": ("buckets.num_buckets", "progress.refresh_every_n_steps"),
}
OPTIONS = ["seed", "min_snr_gamma", "ema.decay", "stop.grace_s", "scoring.num_prompts"]
OPTIONS += ["image_prompt_check.every_n_steps", *(f"{group}.{name}" for group in GROUPS for name in GROUPS[group])]
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
