"""The samples of a step: shared by accumulation, and what they do to the learning rate."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from bystanders import WITNESS, Witness
from conftest import Run, checkpoint, column

QUIET = ("trainer.max_steps=3", "data.val=null", "scoring=null", "image_prompt_check.every_n_steps=100")
# Adam divides by the gradient's size and so makes much of a difference in rounding; this one does not
PLAIN = ("optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1", "optimizer.weight_decay=0")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint(folder)["state_dict"]


def test_accumulated_batches_are_one_large_one(train_in: Run, tmp_path: Path) -> None:
    found = {}
    for batch, times in ((4, 1), (2, 2), (2, 1)):
        sizes = (f"data.batch_size={batch}", f"trainer.accumulate_grad_batches={times}")
        folder = train_in(tmp_path / f"{batch}x{times}", *QUIET, *PLAIN, *sizes, WITNESS)
        keys = {step: [*chain(*batches)] for step, batches in Witness.keys.items()}
        found[batch, times] = weights(folder), keys
    (whole, keys), (pieces, keys_of_pieces), (half, _) = found.values()

    assert keys_of_pieces == keys and {len(step) for step in keys.values()} == {4} and list(keys) == [1, 2, 3]
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    assert max((half[name] - whole[name]).abs().max() for name in whole) > 1e-4


def test_accumulation_shares_the_global_batch(train_in: Run, tmp_path: Path) -> None:
    shared = ("data.batch_size=null", "global_batch_size=6", "trainer.accumulate_grad_batches=3")
    train_in(tmp_path / "x", *QUIET, *shared, WITNESS)

    assert {step: [len(keys) for keys in batches] for step, batches in Witness.keys.items()} == {
        step: [2, 2, 2] for step in (1, 2, 3)
    }


@pytest.mark.parametrize(("scaling", "factor"), [("null", 1), ("linear", 1 / 16), ("sqrt", 1 / 4)])
def test_the_learning_rate_follows_the_samples_of_a_step(
    train_in: Run, tmp_path: Path, scaling: str, factor: float
) -> None:
    """Two batches of two, where the paper has 64."""
    sizes = ("data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.max_steps=1")
    folder = train_in(tmp_path / "x", *QUIET, *sizes, f"scale_lr={scaling}", "optimizer.lr=0.008")

    assert float(column(folder, "train/lr")[1]) == pytest.approx(0.008 * factor, rel=1e-6)
    saved = checkpoint(folder)["optimizer_states"][0]["param_groups"][0]
    assert saved["initial_lr"] == pytest.approx(0.008 * factor, rel=1e-6)


def test_warm_up_climbs_and_cosine_falls_to_the_last_step(train_in: Run, tmp_path: Path) -> None:
    schedule = ("schedule=cosine", "schedule.num_warmup_steps=2", "optimizer.lr=0.01")
    folder = train_in(tmp_path / "x", *QUIET, *schedule, "trainer.max_steps=6")

    rates = [float(rate) for rate in column(folder, "train/lr").values()]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.00853553, 0.005, 0.00146447], abs=1e-6)


def test_a_schedule_is_stretched_to_the_new_end_of_a_run_that_goes_on(train_in: Run, tmp_path: Path) -> None:
    """The saved configuration holds the old end; past it a cosine would climb again."""
    schedule = ("schedule=cosine", "optimizer.lr=0.01")
    folder = train_in(tmp_path / "x", *QUIET, *schedule, "trainer.max_steps=2")
    train_in(folder, *QUIET, *schedule, "trainer.max_steps=6")

    rates = [float(rate) for rate in column(folder, "train/lr").values()]
    assert rates[:2] == pytest.approx([0.01, 0.005], abs=1e-6)
    assert rates[3:] == pytest.approx([0.005, 0.0025, 0.00066987], abs=1e-6)
