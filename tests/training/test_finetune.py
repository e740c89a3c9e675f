"""Fine-tuning: what it starts from and keeps, when held-out samples end it, and what they warn of."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tiny
import torch
from conftest import FEW, Run, assert_same_run, checkpoint, column, rewound, saved_configuration
from hydra.utils import instantiate
from safetensors.torch import load_file

from ipa.export.loading import load_model
from ipa.files import read_json
from ipa.model import IPAdapterModel
from ipa.training.heldout import HeldOutGap
from ipa.training.monitors import ImagePromptGuard, compare_images
from ipa.weights import count_parameters

BEST = "adapter_best.safetensors"
WATCHED = (
    *("experiment=finetune", "adapter.freeze=head", *FEW),
    *("image_prompt_check.every_n_steps=1", "heldout_check.every_n_steps=2"),
)


@pytest.fixture(scope="module")
def donor(finished: Path) -> str:
    return f"adapter.init_from={finished / 'adapter.safetensors'}"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, train_in: Run, donor: str) -> Path:
    """Six steps without a stop; only to be read."""
    return train_in(tmp_path_factory.mktemp("runs") / "watched", *WATCHED, donor, "trainer.max_steps=6")


def test_what_is_frozen_stays_and_is_in_the_files(watched: Path, finished: Path) -> None:
    before, after = (load_file(folder / "adapter.safetensors") for folder in (finished, watched))
    state = checkpoint(watched)
    branches = [name for name in state["state_dict"] if name.startswith("trainable.ip_adapter.")]

    assert [float(lr) for lr in column(watched, "train/lr").values()] == pytest.approx([1e-4] * 6)  # a tenth
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("image_proj."), name
    assert len(state["optimizer_states"][0]["state"]) == len(branches)
    trained = sum(state["state_dict"][name].numel() for name in branches)
    assert read_json(watched / "summary.json")["parameters trained"] == trained


@pytest.mark.parametrize(("part", "kept"), [("head", "ip_adapter."), ("branches", "image_proj.")])
def test_only_the_rest_gets_gradients(part: str, kept: str, model: IPAdapterModel) -> None:
    model.adapter.install()
    model.freeze(part)
    model.errors(tiny.make_batch()).loss.backward()

    for name, parameter in model.trainable.named_parameters():
        assert (parameter.grad is not None) == name.startswith(kept), name
    assert sum(each.numel() for each in model.trained()) < count_parameters(model.trainable)


def test_the_gap_is_that_of_the_held_out_samples_with_the_weights_of_the_file(watched: Path) -> None:
    gaps = {step: float(gap) for step, gap in column(watched, "image_prompt/heldout_gap").items()}
    assert list(gaps) == [2, 4, 6]
    step = max(gaps, key=lambda each: gaps[each])
    assert load_file(watched / BEST).keys() == load_file(watched / "adapter.safetensors").keys()
    data = instantiate(saved_configuration(watched).data)
    data.fit_to(image_size_px=16, reference_size_px=24, latent_shape=(4, 8, 8))
    model = load_model(watched / BEST)
    pairs = [(*compare_images(model, batch), len(batch)) for batch in data.val_dataloader()]
    own, other = (sum(pair[i] * pair[2] for pair in pairs) for i in (0, 1))

    assert (other - own) / own == pytest.approx(gaps[step], rel=0.02)
    assert f"step {step}" in read_json(watched / "summary.json")["best adapter"]
    training = [float(gap) for gap in column(watched, "image_prompt/gap").values()]
    for step, overfit in column(watched, "image_prompt/overfit").items():  # the difference to training samples
        assert float(overfit) == pytest.approx(sum(training[:step]) / step - gaps[step], abs=1e-6)
    assert list(column(watched, "image_prompt/overfit")) == [2, 4, 6]


def test_it_resumes_to_the_bit(train_in: Run, tmp_path: Path, donor: str, watched: Path) -> None:
    again = train_in(rewound(watched, tmp_path / "x"), *WATCHED, donor, "trainer.max_steps=6")

    assert_same_run(again, watched)
    for name in ("image_prompt/heldout_gap", "image_prompt/overfit"):
        assert column(again, name) == column(watched, name)


def test_it_stops_when_the_gap_no_longer_grows_and_stays_stopped(train_in: Run, tmp_path: Path, donor: str) -> None:
    """Weights that do not move have the same gap each time, so the first is the best."""
    options: tuple[str, ...] = (*WATCHED, donor, "lr_factor=1e-30", "optimizer.weight_decay=0", "trainer.max_steps=9")
    options += ("heldout_check.every_n_steps=1", "heldout_check.patience=2", "preview.every_n_steps=0")
    run = train_in(tmp_path / "x", *options)
    summary = read_json(run / "summary.json")

    assert summary["steps"] == checkpoint(run)["global_step"] == 3 and summary["stopped early"]
    assert (run / "adapter.safetensors").exists() and (run / "previews" / "step_000003.png").exists()
    before = (run / "log.csv").read_bytes()
    train_in(run, *options)
    assert (run / "log.csv").read_bytes() == before


def test_the_alarm_warns_once_and_not_for_the_scatter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watcher, sure, scattered, early = HeldOutGap(tmp_path / BEST), *(ImagePromptGuard(1, patience=4) for _ in range(3))
    sure.gaps.extend([0.20, 0.21, 0.19, 0.20])
    scattered.gaps.extend([0.6, -0.4, 0.7, -0.1])
    early.gaps.extend([0.2, 0.2, 0.2])
    with caplog.at_level(logging.WARNING, logger="ipa.training.heldout"):
        for guard, gap in ((sure, 0.11), (scattered, 0.09), (early, 0.09)):
            watcher.judge(guard, gap, 10)
        assert not caplog.messages
        watcher.judge(sure, 0.09, 20)
        watcher.load_state_dict(watcher.state_dict())
        watcher.judge(sure, 0.01, 30)

    (message,) = caplog.messages
    assert message.startswith("step 20: the adapter overfits") and "20.00 %" in message and "9.00 %" in message
