"""What changes the arithmetic of a step and nothing else: bfloat16, recomputed, compiled blocks, weights over time."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from bystanders import WITNESS, Witness
from conftest import QUIET, SIX, Run, assert_same_run, checkpoint, column, rewound
from omegaconf import OmegaConf
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler

from ipa.errors import UserError
from ipa.training.failures import explain_fit_failure
from ipa.training.run import check_strategy
from ipa.training.strategies import AdapterDDP

HALF = ("trainer.precision=bf16-mixed", "base.dtype=bfloat16", "encoder.dtype=bfloat16")


@pytest.fixture(scope="module")
def plain(train_in: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-grained run in float32; only to be read."""
    few = ("experiment=decoupled_fine_grained", "trainer.max_steps=2")
    return train_in(tmp_path_factory.mktemp("runs") / "plain", *few, *QUIET)


def losses(folder: Path) -> list[float]:
    return [float(loss) for loss in column(folder, "train/loss").values()]


def dtypes(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


def test_the_frozen_parts_are_in_bfloat16_and_the_adapter_is_not(train_in: Run, tmp_path: Path, plain: Path) -> None:
    few = ("ema.decay=0.9", "trainer.max_steps=2", "preview.num_prompts=1", WITNESS)
    folder = train_in(tmp_path / "x", "experiment=decoupled_fine_grained", *HALF, *few)
    model, saved = Witness.module.model, checkpoint(folder)
    moments = [value for state in saved["optimizer_states"][0]["state"].values() for value in state.values()]
    weights = [value for name, value in saved["state_dict"].items() if name != "average.count"]

    assert dtypes(model.family) == dtypes(model.encoder) == {torch.bfloat16}
    assert dtypes(model.trainable) == {value.dtype for value in [*moments, *weights]} == {torch.float32}
    assert all(0 < loss < 10 for loss in losses(folder))
    assert losses(folder)[0] == pytest.approx(losses(plain)[0], rel=0.05)
    assert losses(folder)[0] != losses(plain)[0]
    assert 0 < float(column(folder, "preview/border_lab")[2]) < 200
    assert -1 < float(column(folder, "preview/clip_i")[2]) <= 1
    assert "scale 1" in (folder / "summary.json").read_text()


def test_recomputed_blocks_give_the_same_losses(train_in: Run, tmp_path: Path, plain: Path) -> None:
    """The gradients are the same too: the weights are, after two steps."""
    recompute = ("gradient_checkpointing=true", "trainer.max_steps=2", WITNESS)
    folder = train_in(tmp_path / "x", "experiment=decoupled_fine_grained", *QUIET, *recompute)

    assert Witness.module.model.family.unet.is_gradient_checkpointing
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-6)
    torch.testing.assert_close(checkpoint(folder)["state_dict"], checkpoint(plain)["state_dict"], rtol=1e-5, atol=1e-6)


def test_min_snr_weighs_the_loss_and_not_the_error(train_in: Run, tmp_path: Path, plain: Path) -> None:
    few = ("trainer.max_steps=1", "min_snr_gamma=5")
    folder = train_in(tmp_path / "x", "experiment=decoupled_fine_grained", *QUIET, *few)

    assert 0 < losses(folder)[0] < 0.95 * losses(plain)[0]
    buckets = ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0")
    errors = [[column(run, f"train/error_t/{bucket}").get(1) for bucket in buckets] for run in (folder, plain)]
    assert errors[0] == errors[1] and any(errors[0])


BUSY = (*SIX, "preview.every_n_steps=2", "preview.num_prompts=2", "preview.num_scored=2")


def test_it_is_refused_with_weights_of_torchao() -> None:
    for compiled, scheme in ((True, None), (False, "fp8"), (False, "int8"), (True, "fp8"), (True, "int8")):
        options = OmegaConf.create({"compile": compiled, "base": {"quantization": scheme}})
        expected = pytest.raises(UserError, match=rf"compile=true.*base\.quantization={scheme}")
        with expected if compiled and scheme else nullcontext():
            check_strategy(options, AdapterDDP())


def test_a_missing_compiler_is_reported_and_other_errors_are_left_alone() -> None:
    error = RuntimeError("backend failed")
    error.__cause__ = InvalidCxxCompiler()
    with pytest.raises(ValueError, match=r"compile=true needs a compiler: g\+\+"):
        explain_fit_failure(error, None, None, None)  # type: ignore[arg-type]
    for left in (UserError("none is good"), RuntimeError("mat1 and mat2")):  # keep their own message
        explain_fit_failure(left, None, None, None)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("gradient_checkpointing=true",)], ids=["plain", "checkpointing"])
def test_it_survives_previews_and_a_resume(train_in: Run, tmp_path: Path, more: tuple[str, ...]) -> None:
    eager = train_in(tmp_path / "eager", *BUSY, *more)
    torch._dynamo.reset()
    whole = train_in(tmp_path / "whole", *BUSY, *more, "compile=true")
    torch._dynamo.reset()
    resumed = train_in(rewound(whole, tmp_path / "x"), *BUSY, *more, "compile=true")

    assert_same_run(resumed, whole)
    assert list(column(whole, "preview/clip_i")) == list(column(eager, "preview/clip_i"))
    torch.testing.assert_close(checkpoint(whole)["state_dict"], checkpoint(eager)["state_dict"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_is_the_blocks_that_run_compiled(train_in: Run, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train_in(tmp_path / "x", *SIX, "compile=true")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
