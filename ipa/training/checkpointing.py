"""Checkpoints that survive a kill at any moment: sealed, written beside, forced to disk, renamed.

``RUN/checkpoints/step_00000300.ckpt`` has all that the step needs to be gone on from: the trained weights and their
average, the optimizer, the schedule, the place in the data, the random state. A thread of the first process writes it
while training goes on.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ipa.distributed import gather
from ipa.errors import UserError
from ipa.training.sealed import BrokenFile, check_seal, read_sealed, write_sealed

NAME = re.compile(r"step_(\d+)\.ckpt")

log = logging.getLogger(__name__)


class BackgroundCheckpointIO(CheckpointIO):
    """Takes a copy of the checkpoint and lets a thread write it, sealed.

    An error of the thread is raised by the next call of any method, ``check`` among them. (Lightning's
    AsyncCheckpointIO copies GPU tensors on the GPU, cannot be waited for, and tells of an error at the next but one
    checkpoint.)
    """

    def __init__(self) -> None:
        self.thread: ThreadPoolExecutor | None = None
        self.pending: list[Future[None]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Returns when the copy is made and the checkpoint before this one is written: there is one copy at a time."""
        self.wait()
        content = apply_to_collection(checkpoint, Tensor, copied)
        self.do(lambda: write_sealed(Path(path), content))

    def do(self, work: Callable[[], None]) -> None:
        """In the thread, after what was asked before; left out when that failed."""
        self.thread = self.thread or ThreadPoolExecutor(1, "checkpoints")
        before = self.pending[-1] if self.pending else None

        def after() -> None:
            if before is None or before.exception() is None:
                work()

        self.pending.append(self.thread.submit(after))

    def check(self) -> None:
        """Raise the thread's error, if there is one by now."""
        while self.pending and self.pending[0].done():
            self.pending.pop(0).result()

    def wait(self) -> None:
        """Until all is on disk."""
        while self.pending:
            self.pending.pop(0).result()

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        self.wait()
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        self.do(lambda: Path(path).unlink(missing_ok=True))

    def teardown(self) -> None:
        self.wait()
        if self.thread is not None:
            self.thread.shutdown()
            self.thread = None


def copied(tensor: Tensor) -> Tensor:
    """In the memory of the CPU, and nobody else's."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


class Checkpoints(L.Callback):
    """A checkpoint at every ``every_n_steps``, before every preview and at the end; the last ``keep_last`` stay.

    So does the best by ``monitor``, a score of the preview that follows a checkpoint; without a judge or held-out
    pictures there is none. Others go when the new one is on disk, so that a kill leaves no gap. What other callbacks
    want to be sure of before, they do in ``settle(trainer, module)``.
    """

    def __init__(
        self,
        folder: str | Path,
        every_n_steps: int,
        preview_every_n_steps: int,
        monitor: str,
        mode: str = "max",
        keep_last: int = 2,
    ) -> None:
        if keep_last < 1:
            raise UserError(f"checkpoint.keep_last={keep_last}: at least 1, or there is nothing to go on from")
        self.folder = Path(folder)
        self.intervals_steps = (every_n_steps, preview_every_n_steps)
        self.monitor = monitor
        self.sign = {"max": 1, "min": -1}[mode]
        self.keep_last = keep_last
        self.best: dict[str, Any] = {"name": "", "score": None}
        self.saved_step = -1

    @property
    def best_path(self) -> Path | None:
        return self.folder / self.best["name"] if self.best["name"] else None

    def on_ready(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises UserError where the ranks would go on from different steps."""
        steps, found = zip(*gather((trainer.global_step, bool(checkpoints_in(self.folder)))), strict=True)
        check_same(steps, self.folder)
        self.saved_step = trainer.global_step if found[0] else -1
        if self.best_path is not None and not self.best_path.is_file():
            self.best = {"name": "", "score": None}  # of another run, whose checkpoint this one began from
        if trainer.is_global_zero:
            remove_unfinished(self.folder)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.saved_step:
            self.take_score(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        writer(trainer).check()
        if any(is_due(trainer, batch_idx, steps) for steps in self.intervals_steps):
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        """To be called by all ranks, after a step; nothing to do where this step is saved already."""
        step = trainer.global_step
        if step == self.saved_step:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if (settle := getattr(callback, "settle", None)) is not None:
                settle(trainer, pl_module)
        check_finite(pl_module.state_dict(), step)
        trainer.save_checkpoint(self.folder / name_of(step))
        self.saved_step = step
        if trainer.is_global_zero:
            best = self.best["name"]
            writer(trainer).do(lambda: prune(self.folder, step, self.keep_last, best))

    def take_score(self, trainer: L.Trainer) -> None:
        """The score of the last preview, if there was one since the last step; on the first rank, which keeps files."""
        score = trainer.callback_metrics.pop(self.monitor, None)
        if score is not None and self.is_better(float(score)):
            self.best = {"name": name_of(trainer.global_step), "score": float(score)}

    def is_better(self, score: float) -> bool:
        return self.best["score"] is None or self.sign * score > self.sign * self.best["score"]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer(trainer).wait()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.take_score(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        try:
            writer(trainer).wait()  # what was begun is good, whatever came after
        except OSError as error:
            if error is not exception:
                log.error("%s", error)

    def state_dict(self) -> dict[str, Any]:
        return self.best

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = dict(state_dict)


def writer(trainer: L.Trainer) -> BackgroundCheckpointIO:
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, BackgroundCheckpointIO)
    return io


def name_of(step: int) -> str:
    return f"step_{step:08d}.ckpt"


def step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def checkpoints_in(folder: Path) -> list[Path]:
    """The newest first; whether they are whole is not looked at."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted((folder / name for name in names if NAME.fullmatch(name)), key=step_of, reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that can be gone on from; broken ones are named in the log and passed over."""
    for path in checkpoints_in(folder):
        try:
            check_seal(path)
            return path
        except (BrokenFile, OSError) as error:
            log.warning("%s is passed over: %s", path, error)
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All of it, on the CPU; raises UserError, or ValueError naming the file and what is wrong with it."""
    if not path.is_file():
        there = ", ".join(each.name for each in checkpoints_in(path.parent)) or "none"
        raise UserError(f"{path}: no such checkpoint; there: {there}")
    try:
        content = read_sealed(path)
    except BrokenFile as error:
        raise UserError(f"{path} is not a checkpoint of a training, or not whole: {error}") from error
    if not (isinstance(content, dict) and {"state_dict", "global_step"} <= content.keys()):
        raise UserError(f"{path} is not a checkpoint of a training")
    return content


def check_same(steps: Sequence[int], folder: Path) -> None:
    """Raise UserError unless all ranks begin at the same step."""
    other = next((rank for rank, step in enumerate(steps) if step != steps[0]), None)
    if other is not None:
        raise UserError(
            f"the processes see different checkpoints in {folder}: rank 0 goes on from step {steps[0]}, rank {other} "
            f"from step {steps[other]}. All machines need the same folder: give paths.runs=FOLDER on a disk that they "
            "share; where they do share it, it may show new files late, so start again"
        )


def prune(folder: Path, step: int, keep_last: int, best: str) -> None:
    """Remove the checkpoints before ``step`` but for the last ones and the best."""
    known = [path for path in checkpoints_in(folder) if step_of(path) <= step]
    for path in known[keep_last:]:
        if path.name != best:
            path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """What a killed process had begun to write."""
    for path in folder.glob(".step_*.tmp"):
        with suppress(OSError):
            path.unlink()


def is_due(trainer: L.Trainer, batch_idx: int, every_n_steps: int) -> bool:
    """Whether what is done at every so many steps, and at the last, is due after this batch; 0 means at the last."""
    return ends_step(trainer, batch_idx) and falls_on(trainer.global_step, trainer.max_steps, every_n_steps)


def falls_on(step: int, max_steps: int, every_n_steps: int) -> bool:
    return step == max_steps or (every_n_steps > 0 and step > 0 and step % every_n_steps == 0)


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step was made after this batch; with accumulation it is not after every one."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise UserError rather than let weights be saved that nobody can use."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"after step {step} {len(broken)} of the {len(tensors)} trained weights are not finite or too large for "
            f"their file ({broken[0]} …), so they are not saved. "
            "Try a smaller optimizer.lr or trainer.gradient_clip_val=1."
        )
