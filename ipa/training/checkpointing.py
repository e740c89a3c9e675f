"""Checkpoints that survive a kill at any moment.

They are in torch's own format, a zip archive: the CRC-32 of its members detects damage, and it is read with
``weights_only``. A thread of the first process writes it.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Callable, Mapping
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
from ipa.errors import UserError, brief
from ipa.files import write_atomically
from ipa.training.hooks import Order, TrainingCallback, callbacks_of, is_due
from ipa.types import first_not_finite

NAME = re.compile(r"step_(\d+)\.ckpt")
FULL_DISK = "keep fewer with checkpoint.keep_last, or choose another run folder with paths.runs=FOLDER, then resume"

log = logging.getLogger(__name__)


class BrokenCheckpoint(UserError):
    """A file that is damaged, cut short, or not a checkpoint."""


class BackgroundCheckpointIO(CheckpointIO):
    """Copies the checkpoint to the CPU and lets a thread write it, whose error every method raises.

    Lightning's ``AsyncCheckpointIO`` copies on the GPU, cannot be waited for, and raises only at a later checkpoint.
    """

    def __init__(self) -> None:
        self.thread: ThreadPoolExecutor | None = None
        self.pending: list[Future[None]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Waits for the previous checkpoint, so that there is one copy at a time; returns when the copy is made."""
        self.wait()
        content = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self.submit(lambda: write_checkpoint(Path(path), content))

    def submit(self, work: Callable[[], None]) -> None:
        """Queue ``work`` for the thread."""
        self.thread = self.thread or ThreadPoolExecutor(1, "checkpoints")
        self.pending.append(self.thread.submit(work))

    def check(self) -> None:
        """Raise the thread's error if there is one by now."""
        while self.pending and self.pending[0].done():
            self.pending.pop(0).result()

    def wait(self) -> None:
        """Return when everything is on disk."""
        while self.pending:
            self.pending.pop(0).result()

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        self.wait()
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        self.submit(lambda: Path(path).unlink(missing_ok=True))

    def teardown(self) -> None:
        self.wait()
        if self.thread is not None:
            self.thread.shutdown()
            self.thread = None


class Checkpoints(TrainingCallback):
    """Saves every ``every_n_steps``, before every preview, and at the end; keeps the last ``keep_last`` and the best.

    The best has the highest ``monitor``, a score of the preview that follows a checkpoint. Old files are removed once
    the new one is on disk.
    """

    order = Order.CHECKPOINT

    def __init__(
        self, folder: str | Path, every_n_steps: int, preview_every_n_steps: int, monitor: str, keep_last: int = 2
    ) -> None:
        self.folder = Path(folder)
        self.intervals_steps = (every_n_steps, preview_every_n_steps)
        self.monitor = monitor
        self.keep_last = keep_last
        self.best: dict[str, Any] = {"name": "", "score": None}
        self.saved_step = -1

    @property
    def best_path(self) -> Path | None:
        return self.folder / self.best["name"] if self.best["name"] else None

    def on_ready(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Raises UserError if the ranks would resume from different steps."""
        steps, found = zip(*gather((trainer.global_step, bool(checkpoints_in(self.folder)))), strict=True)
        if (other := next((rank for rank, step in enumerate(steps) if step != steps[0]), None)) is not None:
            raise UserError(
                f"the processes see different checkpoints in {self.folder}: rank 0 resumes from step {steps[0]}, rank "
                f"{other} from step {steps[other]}. Give paths.runs=FOLDER on a disk that all machines share. If they "
                "share it, it may show new files late: start again"
            )
        self.saved_step = trainer.global_step if found[0] else -1
        if self.best_path is not None and not self.best_path.is_file():
            self.best = {"name": "", "score": None}  # the run started from a checkpoint of another run
        if trainer.is_global_zero:
            remove_leftovers(self.folder.parent)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.saved_step:
            self.take_score(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        checkpoint_io(trainer).check()
        if any(is_due(trainer, batch_idx, steps) for steps in self.intervals_steps):
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save after a step, unless that step is saved already. All ranks call this."""
        step = trainer.global_step
        if step == self.saved_step:
            return
        for callback in callbacks_of(trainer, TrainingCallback):
            callback.before_checkpoint(trainer, pl_module)
        check_finite(pl_module.state_dict(), step)
        trainer.save_checkpoint(self.folder / file_name(step))
        self.saved_step = step
        if trainer.is_global_zero:
            best = self.best["name"]
            checkpoint_io(trainer).submit(lambda: prune(self.folder, step, self.keep_last, best))

    def take_score(self, trainer: L.Trainer) -> None:
        """Take the score of the preview since the last step, if there was one; only the first rank has it."""
        score, best = trainer.callback_metrics.pop(self.monitor, None), self.best["score"]
        if score is not None and (best is None or float(score) > best):
            self.best = {"name": file_name(trainer.global_step), "score": float(score)}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        checkpoint_io(trainer).wait()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.take_score(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        try:
            checkpoint_io(trainer).wait()  # a checkpoint that was begun is good, whatever failed later
        except Exception as error:  # must not hide ``exception``
            if error is not exception:
                log.error("%s", error)

    def state_dict(self) -> dict[str, Any]:
        return self.best

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = dict(state_dict)


def checkpoint_io(trainer: L.Trainer) -> BackgroundCheckpointIO:
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, BackgroundCheckpointIO)
    return io


def write_checkpoint(path: Path, content: Any) -> None:
    """Write ``content``, tensors in plain containers, atomically; raises UserError on a full disk."""
    write_atomically(path, lambda temporary: save(content, temporary), FULL_DISK)


def save(content: Any, path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch replaces the system's error by one of its own
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; raises UserError with the file and the reason if it is missing or broken."""
    if not path.is_file():
        found = ", ".join(each.name for each in checkpoints_in(path.parent)) or "none"
        raise UserError(f"{path}: no such checkpoint; the folder has: {found}")
    try:
        return load(path)
    except BrokenCheckpoint as error:
        raise BrokenCheckpoint(f"{path} is not a checkpoint of a training, or is damaged: {error}") from error


def remove_leftovers(run: Path) -> None:
    """Of ``write_atomically`` in killed processes."""
    for leftover in [*run.glob(".*.tmp"), *run.glob("*/.*.tmp")]:
        with suppress(OSError):
            leftover.unlink()


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Check the CRC-32 of every member, then load; with ``mmap`` tensors are read only when used."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise BrokenCheckpoint(f"it is damaged (CRC-32 of {damaged})")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except BrokenCheckpoint:
        raise
    except Exception as error:  # damaged bytes raise almost anything
        raise BrokenCheckpoint(f"it is cut short, or holds more than tensors ({brief(error)})") from error
    if not (isinstance(content, dict) and {"state_dict", "global_step"} <= content.keys()):
        raise BrokenCheckpoint("it has no state_dict and global_step")
    return content


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that can be loaded; broken ones are logged and skipped."""
    for path in checkpoints_in(folder):
        try:
            load(path, mmap=True)
            return path
        except BrokenCheckpoint as error:
            log.warning("%s is skipped: %s", path, error)
    return None


def where_to_start(folder: Path, resume: str) -> Path | None:
    """The checkpoint to resume from, None to start anew; raises UserError rather than lose a run's checkpoints.

    ``resume`` is auto, never, or a file that is used until the run has checkpoints of its own.
    """
    own = checkpoints_in(folder)
    if resume == "never" and own:
        raise UserError(f"resume=never, but {folder} has checkpoints: give another name=, or resume=auto")
    newest = newest_whole(folder)
    if newest is None and own:
        raise UserError(
            f"none of the {len(own)} checkpoints in {folder} is whole, see above; to start anew, move them away"
        )
    if newest is not None or resume in ("auto", "never"):
        return newest
    if not Path(resume).is_file():
        raise UserError(
            f"resume={resume}: no such checkpoint. Give auto, never, or a file as runs/…/checkpoints/step_00000600.ckpt"
        )
    read_checkpoint(Path(resume))
    return Path(resume)


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints, newest first; they are not checked."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted((folder / name for name in names if NAME.fullmatch(name)), key=step_of, reverse=True)


def file_name(step: int) -> str:
    return f"step_{step:08d}.ckpt"


def step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise UserError rather than write weights that are not finite."""
    if broken := first_not_finite(tensors):
        raise UserError(
            f"after step {step} the weights {broken[0]} are not finite or too large for their file, so they are not "
            "saved. Try a smaller optimizer.lr or trainer.gradient_clip_val=1"
        )


def prune(folder: Path, step: int, keep_last: int, best: str) -> None:
    """Once the checkpoint of ``step`` is there, remove older ones except the last ``keep_last`` and the best."""
    known = [path for path in checkpoints_in(folder) if step_of(path) <= step]
    if folder / file_name(step) not in known:
        return  # it could not be written
    for path in known[keep_last:]:
        if path.name != best:
            path.unlink(missing_ok=True)
