"""`compile=true`: the same training, compiled; previews, checks and a resume in between change nothing."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from bystanders import stopping
from conftest import SIX, Run, assert_same_run, checkpoint, column
from omegaconf import OmegaConf
from torch._inductor.exc import InvalidCxxCompiler

from ipa.errors import UserError
from ipa.training.failures import explain_fit_failure
from ipa.training.run import check_strategy
from ipa.training.strategies import AdapterDDP

BUSY = (*SIX, "preview.every_n_steps=2", "preview.num_prompts=2", "preview.num_scored=2")


def test_it_is_refused_with_weights_of_torchao() -> None:
    for compiled, scheme in ((True, None), (False, "fp8"), (False, "int8"), (True, "fp8"), (True, "int8")):
        options = OmegaConf.create({"compile": compiled, "base": {"quantization": scheme}})
        expected = pytest.raises(UserError, match=rf"compile=true.*base\.quantization={scheme}")
        with expected if compiled and scheme else nullcontext():
            check_strategy(options, AdapterDDP())


def test_a_missing_compiler_is_reported() -> None:
    error = RuntimeError("backend failed")
    error.__cause__ = InvalidCxxCompiler()
    with pytest.raises(ValueError, match=r"compile=true needs a compiler: g\+\+"):
        explain_fit_failure(error, None, None, None)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("gradient_checkpointing=true",)], ids=["plain", "checkpointing"])
def test_it_survives_previews_and_a_resume(train_in: Run, tmp_path: Path, more: tuple[str, ...]) -> None:
    eager = train_in(tmp_path / "eager", *BUSY, *more)
    torch._dynamo.reset()
    whole = train_in(tmp_path / "whole", *BUSY, *more, "compile=true")
    torch._dynamo.reset()
    compiled = (*BUSY, *more, "compile=true", *stopping(4, tmp_path / "stop"))
    with pytest.raises(RuntimeError, match="on purpose"):
        train_in(tmp_path / "x", *compiled)
    train_in(tmp_path / "x", *compiled)

    assert_same_run(tmp_path / "x", whole)
    for folder in (whole, tmp_path / "x"):
        assert list(column(folder, "preview/clip_i")) == list(column(eager, "preview/clip_i"))
    torch.testing.assert_close(checkpoint(whole)["state_dict"], checkpoint(eager)["state_dict"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_is_the_blocks_that_run_compiled(train_in: Run, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train_in(tmp_path / "x", *SIX, "compile=true")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
