"""A run that hangs writes the stack of every rank to a file, with ``faulthandler``, which needs no interpreter lock."""

from __future__ import annotations

import faulthandler
import logging
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import lightning as L

from ipa.training.hooks import TrainingCallback

REARM_FRACTION = 1 / 20  # of the limit: re-arming starts a thread, too much for every step
# `kill -RTMIN PID` makes a rank or a data worker write its stack; jobs are stopped by USR1 and USR2
DUMP: int | None = getattr(signal, "SIGRTMIN", None)

log = logging.getLogger(__name__)


class StallMonitor(TrainingCallback):
    """Appends the stacks of a rank to ``folder/rank_0.txt`` if no batch starts or ends for ``minutes``.

    Previews and checkpoints come between two batches and have the whole time for themselves, as does the first step.
    Nothing is stopped. ``minutes`` None disables it. Without a stall no file is left.
    """

    def __init__(self, folder: str | Path, minutes: float | None) -> None:
        self.folder = Path(folder)
        self.limit_s = None if minutes is None else 60.0 * minutes
        self.file: IO[str] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Data workers are forked later, so they inherit the file and the signal handler."""
        if self.limit_s is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = (self.folder / f"rank_{trainer.global_rank}.txt").open("a")
            if DUMP is not None:
                faulthandler.register(DUMP, self.file)
            self.arm()

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.alive(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.alive(trainer)

    def alive(self, trainer: L.Trainer) -> None:
        if self.file is None or self.limit_s is None:
            return
        waited_s = time.monotonic() - self.armed_at
        if waited_s > self.limit_s * (1 + REARM_FRACTION):
            log.warning(
                "rank %d was stalled for %.3g minutes at step %d (guard.stall_minutes): its stack is in %s",
                *(trainer.global_rank, waited_s / 60, trainer.global_step, self.file.name),
            )
        if waited_s > self.limit_s * REARM_FRACTION:
            self.arm()

    def arm(self) -> None:
        assert self.file is not None and self.limit_s is not None
        self.armed_at = time.monotonic()
        faulthandler.dump_traceback_later(self.limit_s * (1 + REARM_FRACTION), file=self.file)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        if DUMP is not None:
            faulthandler.unregister(DUMP)
        self.file.close()
        path, self.file = Path(self.file.name), None
        if not path.stat().st_size:
            path.unlink()
            with suppress(OSError):  # other ranks may have files there
                path.parent.rmdir()
