"""What must not get into a run, and what it says when it hangs or has no memory."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import faults
import lightning as L
import pytest
import torch
from bystanders import WITNESS, Witness
from conftest import EVERYTHING, ROOT, Command, Run, checkpoint, column
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from ipa.cli import explain_failure
from ipa.model import Errors
from ipa.training.checkpointing import checkpoints_in
from ipa.training.guards import FiniteGuard, StepRecord, sum_of_bits
from ipa.training.memory import explain_memory
from ipa.training.stalls import Watch
from ipa.types import Batch

QUIET = ("data.val=null", "scoring=null")
SKIP = "guard.on_nonfinite=skip"


def lines(file: Path) -> dict[tuple[int, int], dict[str, int]]:
    """What a probe wrote, by step and rank."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return {(line["step"], line["rank"]): line for line in found}


def test_a_bad_sample_stops_the_run_before_anything_is_written(train_in: Run, tmp_path: Path) -> None:
    """Step 4 is one at which previews, adapter and checkpoint are due; only the one bad sample is named."""
    folder = tmp_path / "x"
    with pytest.raises(ValueError, match="the loss of step 4 is nan") as caught:
        train_in(folder, *faults.overrides("Poison", steps=[4]), WITNESS)

    message = explain_failure(caught.value)
    assert message is not None
    assert f"keys {Witness.keys[4][0][1]}." in message
    assert "00000.tar" in message or "00001.tar" in message
    assert "guard.on_nonfinite=skip" in message
    assert list(column(folder, "train/loss")) == [1, 2, 3]
    assert [path.name for path in checkpoints_in(folder / "checkpoints")] == ["step_00000002.ckpt"]
    assert [path.name for path in (folder / "previews").iterdir()] == ["step_000002.png"]
    described = checkpoint(folder)["adapter_metadata"]
    assert described["step"] == "2"


def test_a_bad_gradient_alone_stops_the_run(train_in: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the gradient of step 2 is not finite\. No sample is by itself") as caught:
        train_in(tmp_path / "x", *QUIET, *faults.overrides("Poison", steps=[2], where="gradient", value="inf"))

    assert str(caught.value).count("0000000") == 4


@pytest.mark.parametrize("where", ["noise", "gradient"])
@pytest.mark.parametrize("fused", ["true", "null"])
def test_a_skipped_step_leaves_everything_as_it_was(train_in: Run, tmp_path: Path, fused: str, where: str) -> None:
    """Weights, moments, average and their counts to the bit; number of the step and learning rate go on."""
    faulty = [
        *faults.overrides("Poison", steps=[3], where=where),
        *faults.overrides("Probe", file=tmp_path / "probe"),
    ]
    folder = train_in(tmp_path / "x", *EVERYTHING, *QUIET, SKIP, f"optimizer.fused={fused}", *faulty)

    changed = {step: line["changed"] for (step, _), line in lines(tmp_path / "probe").items()}
    assert changed[3] == 0
    assert all(changed[step] for step in (2, 4, 5, 6))
    assert list(column(folder, "train/skipped_steps").values()) == ["0.0"] * 2 + ["1.0"] * 4
    assert '"steps skipped": 1' in (folder / "summary.json").read_text()
    saved = checkpoint(folder)
    assert saved["global_step"] == saved["lr_schedulers"][0]["last_epoch"] == 6
    assert saved["state_dict"]["average.count"] == 5
    assert {float(state["step"]) for state in saved["optimizer_states"][0]["state"].values()} == {5}


def test_skipping_ends_after_so_many_in_a_row(train_in: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = [SKIP, "guard.most_skips=2", "trainer.max_steps=8"]

    with pytest.raises(ValueError, match=r"the loss of step 6 .* in a row that were left out: 2"):
        train_in(tmp_path / "x", *QUIET, *few, *faults.overrides("Poison", steps=[1, 3, 5, 6]))

    told = [record.message for record in caplog.records if "It is left out" in record.message]
    assert [message.split()[4] for message in told] == ["1", "3", "5"]
    assert all("keys 0000" in message for message in told)


def test_skips_are_counted_on_after_a_stop(train_in: Run, tmp_path: Path) -> None:
    poison = faults.overrides("Poison", steps=[2, 4])
    train_in(tmp_path / "x", *QUIET, SKIP, *poison, "trainer.max_steps=2")

    folder = train_in(tmp_path / "x", *QUIET, SKIP, *poison)

    assert list(column(folder, "train/skipped_steps").values()) == ["0.0", "1.0", "1.0", "2.0"]


def test_settling_reads_what_is_still_on_its_way() -> None:
    guard: Any = FiniteGuard()
    guard.is_scaled = False
    numbers = torch.tensor([1.0, 1.0, 0.5, torch.nan])
    guard.records.append(StepRecord.sent(7, ["a", "b"], ["0.tar", "1.tar"], numbers))

    with pytest.raises(ValueError, match=r"the loss of step 7 is nan.* shards 1.tar; keys b\."):
        guard.settle(None, None)


@pytest.mark.parametrize("values", [{"on_nonfinite": "ignore"}, {"most_skips": 0}])
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"guard\."):
        FiniteGuard(**values)


class Line(L.LightningModule):
    """A straight line, which shows the guard what an adapter shows it. One step may have another x and target."""

    def __init__(self, bad_step: int | None, x: float = torch.nan, target: float = 1.0) -> None:
        super().__init__()
        self.line, self.bad_step, self.bad = nn.Linear(4, 1, bias=False), bad_step, (x, target)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        x, target = self.bad if batch_idx + 1 == self.bad_step else (1.0, 1.0)
        error_B = (self.line(torch.full((2, 4), x)).float() - target).square().mean(1)
        return {"loss": error_B.mean(), "errors": Errors(error_B, torch.ones(2), torch.zeros(2))}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, fused=True)


def fit(module: Line, scaler: torch.amp.GradScaler | None = None) -> None:
    """Six steps, clipped; in float16 with a scaler."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=6,
        callbacks=[FiniteGuard()],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if scaler else [],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch = Batch(["", ""], draws=None, keys=["a", "b"], shards=["0.tar"] * 2)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader([batch] * 6, batch_size=None))  # type: ignore[arg-type]


def test_an_infinite_loss_counts_although_its_gradient_is_finite() -> None:
    with pytest.raises(ValueError, match="the loss of step 2 is inf"):
        fit(Line(2, x=1e-30, target=1e20))


def test_a_scaler_may_find_its_scale_and_a_nan_loss_is_still_told() -> None:
    """The gradients of the first steps are infinite, which is how the scaler works: it halves the scale."""
    scaler, module = torch.amp.GradScaler("cpu", init_scale=2.0**18), Line(None)
    fit(module, scaler)

    assert scaler.get_scale() < 2.0**18
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    with pytest.raises(ValueError, match="the loss of step 5 is nan"):
        fit(Line(5), torch.amp.GradScaler("cpu"))


def test_a_frozen_weight_that_moves_is_noticed_before_the_next_checkpoint(train_in: Run, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="frozen weights changed before step 2"):
        train_in(tmp_path / "x", *QUIET, *faults.overrides("Mover"))

    assert not list((tmp_path / "x").rglob("*.ckpt"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("place", [0, 3, -1])
def test_the_sum_of_bits_notices_any_one_change(dtype: torch.dtype, place: int) -> None:
    """Of odd lengths, parts of a storage, and transposed ones, too."""
    storage = (torch.arange(70) % 2).to(dtype)
    for tensor in (storage, storage[1:12], storage[:66].view(6, 11).T):
        before, flat = sum_of_bits(tensor), tensor.reshape(-1)
        assert sum_of_bits(tensor) == before
        flat[place] = ~flat[place] if dtype is torch.bool else flat[place] + 1
        assert sum_of_bits(flat.view(tensor.shape)) != before


PAIR = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "~logger.wandb")
WHERE = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_leave_out_the_step_that_one_of_them_spoilt(start: Command, tmp_path: Path, strategy: str) -> None:
    faulty = [*faults.overrides("Poison", steps=[3], rank=1), *faults.overrides("Probe", file=tmp_path / "probe")]
    process = start(
        f"trainer={strategy}", *PAIR, *QUIET, SKIP, "ema.decay=0.9", *faulty, PYTHONPATH=WHERE, OMP_NUM_THREADS="1"
    )
    output, _ = process.communicate(timeout=300)

    assert process.returncode == 0, output
    found = lines(tmp_path / "probe")
    assert {(step, rank): bool(line["changed"]) for (step, rank), line in found.items()} == {
        (step, rank): step != 3 for step in (2, 3, 4) for rank in (0, 1)
    }
    assert "the loss of step 3 is nan" in output
    folder = tmp_path / "runs/decoupled_global/x"
    assert column(folder, "train/skipped_steps")[4] == "1.0"


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step_and_name_the_others_sample(start: Command, tmp_path: Path) -> None:
    poison = faults.overrides("Poison", steps=[3], rank=1)
    process = start("trainer=ddp", *PAIR, *QUIET, *poison, PYTHONPATH=WHERE, OMP_NUM_THREADS="1")
    output, _ = process.communicate(timeout=300)

    assert process.returncode == 1, output
    assert "the loss of step 3 is nan. The samples that made it so" in output
    assert "Traceback" not in output


def test_stalled_data_are_told_with_the_workers_stacks(
    train_in: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker reads on when its own stack is there."""
    file = tmp_path / "x/stalls/rank_0.txt"
    hang = [*faults.overrides("BadSource", file=file), "data.num_workers=1", "guard.stall_minutes=0.01"]
    with caplog.at_level(logging.WARNING):
        folder = train_in(tmp_path / "x", *QUIET, *hang, "trainer.max_steps=2")

    assert faults.has_stack(file, "Timeout", "fit_loop.py", "data worker, process", "hang_in_source")
    assert any("rank 0 has made no step" in record.message for record in caplog.records)
    assert any("came alive again" in record.message for record in caplog.records)
    assert len(column(folder, "train/loss")) == 2


def test_a_stalled_step_is_told_with_its_stack(train_in: Run, tmp_path: Path) -> None:
    file = tmp_path / "x/stalls/rank_0.txt"
    hang = [*faults.overrides("HangingStep", file=file), "guard.stall_minutes=0.01", "trainer.max_steps=2"]
    train_in(tmp_path / "x", *QUIET, *hang)

    assert faults.has_stack(file, "process", "Timeout", "hang_in_step")


def test_the_stack_is_written_while_c_code_holds_the_interpreter(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "rank_0.txt", limit_s=0.1, rank=0)
    faults.hold_the_interpreter(1)
    watch.close()

    assert faults.has_stack(watch.path, "Timeout", "hold_the_interpreter")


def test_without_a_stall_no_file_is_left(train_in: Run, tmp_path: Path) -> None:
    folder = train_in(tmp_path / "x", *QUIET, "trainer.max_steps=1")

    assert not (folder / "stalls").exists()


def test_out_of_memory_names_what_to_try(train_in: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out of memory in step 2, on the CPU") as caught:
        train_in(tmp_path / "x", *QUIET, *faults.overrides("Greedy"))

    message = explain_failure(caught.value)
    assert message is not None
    for words in (
        "4 samples at a time",
        "precision 32-true and gradient checkpointing off",
        "1. data.batch_size=2 trainer.accumulate_grad_batches=2",
        "2. gradient_checkpointing=true",
        "3. image_size_px",
        "4. trainer=fsdp",
        "5. trainer.precision=bf16-mixed",
        "tried to allocate 1152921504606846976 bytes",
    ):
        assert words in message


def test_a_killed_data_worker_is_told_with_what_it_holds(train_in: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a data worker was killed") as caught:
        train_in(tmp_path / "x", *QUIET, *faults.overrides("BadSource"), "data.num_workers=1")

    assert "data.num_workers=1" in str(caught.value)
    assert "data.window=" in str(caught.value)


def test_other_errors_are_left_as_they_are() -> None:
    explain_memory(RuntimeError("mat1 and mat2"), None, None, None)  # type: ignore[arg-type]
