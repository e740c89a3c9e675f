"""The samples of a step: shared by accumulation, and what they do to the learning rate."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from bystanders import WITNESS, Witness
from conftest import QUIET, Run, checkpoint, column

from ipa.training.run import learning_rate_factor

# Adam divides by the gradient's size and so makes much of a difference in rounding; this one does not
PLAIN = ("optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1", "optimizer.weight_decay=0")


def test_accumulated_batches_are_one_large_one(train_in: Run, tmp_path: Path) -> None:
    found = {}
    for batch, times in ((4, 1), (2, 2), (2, 1)):
        size = f"data.batch_size={batch}" if times == 1 else f"data.batch_size=null global_batch_size={batch * times}"
        sizes = (*size.split(), f"trainer.accumulate_grad_batches={times}", "trainer.max_steps=2")
        folder = train_in(tmp_path / f"{batch}x{times}", *QUIET, *PLAIN, *sizes, WITNESS)
        keys = {step: [*chain(*batches)] for step, batches in Witness.keys.items()}
        found[batch, times] = checkpoint(folder)["state_dict"], keys
    (whole, keys), (pieces, keys_of_pieces), (half, _) = found.values()

    assert keys_of_pieces == keys and {len(step) for step in keys.values()} == {4} and list(keys) == [1, 2]
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    assert max((half[name] - whole[name]).abs().max() for name in whole) > 1e-4


def test_the_learning_rate_follows_the_samples_of_a_step() -> None:
    """Four, where the paper has 64."""
    assert [learning_rate_factor(scaling, 4) for scaling in (None, "linear", "sqrt")] == [1, 1 / 16, 1 / 4]


def test_the_learning_rate_is_scaled_and_the_cosine_stretched_to_the_new_end_of_a_resumed_run(
    train_in: Run, tmp_path: Path
) -> None:
    """After a warm-up of two steps; two batches of two are 1/16 of the paper's batch.

    Past the old end a cosine would climb again.
    """
    sizes = ("data.batch_size=2", "trainer.accumulate_grad_batches=2", "scale_lr=linear", "optimizer.lr=0.16")
    overrides = (*QUIET, *sizes, "schedule=cosine", "schedule.num_warmup_steps=2")
    train_in(tmp_path / "x", *overrides, "trainer.max_steps=4")
    folder = train_in(tmp_path / "x", *overrides, "trainer.max_steps=6")

    rates = [float(rate) for rate in column(folder, "train/lr").values()]
    assert rates[:4] == pytest.approx([0, 0.005, 0.01, 0.005], abs=1e-6)
    assert rates[5:] == pytest.approx([0.00146447], abs=1e-6)  # the first step of a resumed run has the old rate
    saved = checkpoint(folder)["optimizer_states"][0]["param_groups"][0]
    assert saved["initial_lr"] == pytest.approx(0.01, rel=1e-6)
