"""A step that is not finite changes nothing; and what a run says when it hangs or has no memory."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import lightning as L
import pytest
import torch
from bystanders import WITNESS, Witness
from conftest import EVERYTHING, QUIET, ROOT, Command, Run, checkpoint, column
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from ipa.errors import UserError
from ipa.model import Errors
from ipa.training.checkpointing import checkpoints_in
from ipa.training.guards import FiniteGuard, StepRecord
from ipa.training.stalls import DUMP, StallMonitor
from ipa.types import Batch

SKIP = "guard.on_nonfinite=skip"


def lines(file: Path) -> dict[tuple[int, int], dict[str, int]]:
    """What a probe wrote, by step and rank."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return {(line["step"], line["rank"]): line for line in found}


def test_a_bad_sample_stops_the_run_before_anything_is_written(train_in: Run, tmp_path: Path) -> None:
    """Step 4 is one at which previews, adapter and checkpoint are due; only the one bad sample is named."""
    folder = tmp_path / "x"
    with pytest.raises(UserError, match="the loss of step 4 is nan") as caught:
        train_in(folder, *faults.overrides("Poison", steps=[4]), WITNESS)

    message = str(caught.value)
    assert f"keys {Witness.keys[4][0][1]}." in message
    assert "00000.tar" in message or "00001.tar" in message
    assert "guard.on_nonfinite=skip" in message
    assert list(column(folder, "train/loss")) == [1, 2, 3]
    assert [path.name for path in checkpoints_in(folder / "checkpoints")] == ["step_00000002.ckpt"]
    assert [path.name for path in (folder / "previews").iterdir()] == ["step_000002.png"]
    assert checkpoint(folder)["adapter_metadata"]["step"] == "2"


@pytest.mark.parametrize(("fused", "where"), [("true", "noise"), ("null", "gradient")])
def test_a_skipped_step_leaves_everything_as_it_was(train_in: Run, tmp_path: Path, fused: str, where: str) -> None:
    """Weights, moments, average and their counts to the bit; number of the step and learning rate go on."""
    faulty = [*faults.overrides("Poison", steps=[3], where=where), *faults.overrides("Probe", file=tmp_path / "probe")]
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


def test_before_a_checkpoint_the_flags_that_are_on_their_way_are_read() -> None:
    guard: Any = FiniteGuard()
    guard.is_scaled = False
    numbers = torch.tensor([1.0, 1.0, 0.5, torch.nan])
    guard.records.append(StepRecord(7, ["a", "b"], ["0.tar", "1.tar"], numbers.tolist))

    with pytest.raises(UserError, match=r"the loss of step 7 is nan.* shards 1.tar; keys b\."):
        guard.before_checkpoint(None, None)


class Line(L.LightningModule):
    """A straight line, which shows the guard what an adapter shows it. Some steps may have another x and target."""

    def __init__(self, bad_steps: tuple[int, ...] = (), x: float = torch.nan, target: float = 1.0) -> None:
        super().__init__()
        self.line, self.bad_steps, self.bad = nn.Linear(4, 1, bias=False), bad_steps, (x, target)
        self.spoils_gradient = False

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        is_bad = batch_idx + 1 in self.bad_steps and not self.spoils_gradient
        x, target = self.bad if is_bad else (1.0, 1.0)
        error_B = (self.line(torch.full((2, 4), x)).float() - target).square().mean(1)
        return {"loss": error_B.mean(), "errors": Errors(error_B, torch.ones(2), torch.zeros(2))}

    def on_after_backward(self) -> None:
        if self.spoils_gradient and self.global_step + 1 in self.bad_steps:
            self.line.weight.grad[0, 0] = torch.inf  # type: ignore[index]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, fused=True)


def fit(module: Line, scaler: torch.amp.GradScaler | None = None, guard: FiniteGuard | None = None) -> None:
    """Six steps, clipped; in float16 with a scaler."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=6,
        callbacks=[guard or FiniteGuard()],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if scaler else [],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch = Batch(["", ""], draws=None, keys=["a", "b"], shards=["0.tar"] * 2)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader([batch] * 6, batch_size=None))  # type: ignore[arg-type]


def test_an_infinite_loss_or_a_bad_gradient_alone_stops_the_run() -> None:
    with pytest.raises(UserError, match="the loss of step 2 is inf"):
        fit(Line((2,), x=1e-30, target=1e20))  # with a finite gradient
    module = Line((2,))
    module.spoils_gradient = True
    with pytest.raises(UserError, match=r"the gradient of step 2 is not finite\..* keys a, b\."):
        fit(module)
    with pytest.raises(UserError, match=r"guard\.on_nonfinite=ignore"):
        FiniteGuard("ignore")


def test_skipping_ends_after_so_many_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    """Also in a row that a resumed run continues."""
    with pytest.raises(UserError, match=r"the loss of step 5 .* 2 steps in a row .*guard\.most_skips"):
        fit(Line((1, 4, 5)), guard=FiniteGuard("skip", most_skips=2))
    skipped = [message for message in caplog.messages if "is skipped" in message]
    assert [message.split()[4] for message in skipped] == ["1", "4"] and all("keys a, b" in each for each in skipped)

    resumed = FiniteGuard("skip", most_skips=3)
    resumed.load_state_dict({"skipped": 4, "in_a_row": 2})
    with pytest.raises(UserError, match="the loss of step 1"):
        fit(Line((1,)), guard=resumed)
    assert resumed.state_dict() == {"skipped": 5, "in_a_row": 3}


def test_a_scaler_may_find_its_scale_and_a_nan_loss_is_still_noticed() -> None:
    """The gradients of the first steps are infinite, which is how the scaler works: it halves the scale."""
    scaler, module = torch.amp.GradScaler("cpu", init_scale=2.0**18), Line()
    fit(module, scaler)

    assert scaler.get_scale() < 2.0**18
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    with pytest.raises(UserError, match="the loss of step 5 is nan"):
        fit(Line((5,)), torch.amp.GradScaler("cpu"))


PAIR = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "~logger.wandb")
WHERE = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_skip_the_step_that_one_of_them_spoilt(start: Command, tmp_path: Path, strategy: str) -> None:
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
    assert "the loss of step 3 is nan. Caused by" in output
    assert "Traceback" not in output


def test_a_stalled_step_writes_its_stack(train_in: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "x/stalls/rank_0.txt"
    hang = [*faults.overrides("HangingStep", file=file), "guard.stall_minutes=0.01", "trainer.max_steps=2"]
    train_in(tmp_path / "x", *QUIET, *hang)

    assert faults.has_stack(file, "Timeout", "hang_in_step")
    assert any("rank 0 was stalled" in message and str(file) in message for message in caplog.messages)


@pytest.fixture
def monitor(tmp_path: Path) -> StallMonitor:
    """Of one rank."""
    monitor = StallMonitor(tmp_path / "stalls", minutes=0.1 / 60)
    monitor.setup(SimpleNamespace(global_rank=0, global_step=3), None, "fit")  # type: ignore[arg-type]
    return monitor


def test_the_stack_is_written_while_c_code_holds_the_interpreter(tmp_path: Path, monitor: StallMonitor) -> None:
    faults.hold_the_interpreter(1)
    monitor.close()

    assert faults.has_stack(tmp_path / "stalls/rank_0.txt", "Timeout", "hold_the_interpreter")


def test_a_data_worker_writes_its_stack_on_request_and_without_a_stall_no_file_is_left(
    tmp_path: Path, monitor: StallMonitor
) -> None:
    monitor.on_train_batch_start(SimpleNamespace(global_step=3))
    monitor.close()
    assert not (tmp_path / "stalls").exists()
    monitor.limit_s = 600
    monitor.setup(SimpleNamespace(global_rank=0, global_step=3), None, "fit")  # type: ignore[arg-type]
    worker = multiprocessing.get_context("fork").Process(target=faults.hang_in_source)
    worker.start()

    def has_answered() -> bool:
        os.kill(worker.pid or 0, DUMP or 0)
        return faults.has_stack(tmp_path / "stalls/rank_0.txt", "hang_in_source")

    faults.wait_until(has_answered)
    worker.kill()
    worker.join()
    monitor.close()


def test_out_of_memory_names_what_to_try(train_in: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out of memory in step 2") as caught:
        train_in(tmp_path / "x", *QUIET, *faults.overrides("Greedy"))

    for words in ("4 samples at a time", "data.batch_size", "gradient_checkpointing=true", "1152921504606846976 bytes"):
        assert words in str(caught.value)


def test_a_killed_data_worker_is_reported_with_what_it_holds(train_in: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a data worker was killed.*data\.num_workers=1.*data\.window="):
        train_in(tmp_path / "x", *QUIET, *faults.overrides("BadSource"), "data.num_workers=1")
