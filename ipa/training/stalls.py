"""A run that hangs says where: the stacks of every rank and of its data workers, while it hangs.

Most stalls are a network file system, a data worker, or a collective that one rank does not reach. Python code may be
stuck in C then, with the interpreter's lock held, so the stacks are written by faulthandler's own thread, which needs
neither. A second thread, which does need the lock, says so in the log and asks the data workers, by a signal.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L

from ipa.errors import UserError

PARTS = 20  # of the limit: how exactly it is kept
WORKER_S = 0.5  # for a worker to write its stacks before the next one is asked
# also for people: `kill -RTMIN PID` on a rank or a data worker. USR1 and USR2 are how jobs are told that they must end
DUMP: int | None = getattr(signal, "SIGRTMIN", None)

log = logging.getLogger(__name__)


class StallWatch(L.Callback):
    """After so many ``minutes`` without a sign of life each rank appends its stacks to ``folder/rank_0.txt``, once.

    Signs of life are the beginning and the end of a batch, so what callbacks do between, previews and checkpoints, has
    the whole time for itself, as has the first step. Nothing is stopped: a run that comes alive says so and goes on.
    ``minutes`` None is no watch at all. Without a stall no file is left.
    """

    def __init__(self, folder: str | Path, minutes: float | None) -> None:
        if minutes is not None and minutes <= 0:
            raise UserError(f"guard.stall_minutes={minutes}: more than 0, or null for no watch")
        self.folder = Path(folder)
        self.limit_s = None if minutes is None else 60.0 * minutes
        self.watch: Watch | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before the data workers are forked, which inherit the file and what the signal does."""
        if stage == "fit" and self.limit_s is not None:
            self.watch = Watch(self.folder / f"rank_{trainer.global_rank}.txt", self.limit_s, trainer.global_rank)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.watch is not None:
            self.watch.is_alive(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.watch is not None:
            self.watch.is_alive(trainer.global_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.end()

    def end(self) -> None:
        if self.watch is not None:
            self.watch.close()
            self.watch = None


class Watch:
    """Of one process. The file ends with a line for the stacks that may follow; it is written anew while none do."""

    def __init__(self, path: Path, limit_s: float, rank: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.limit_s, self.rank, self.step = path, limit_s, rank, 0
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.head = self.end = os.lseek(self.file, 0, os.SEEK_END)
        self.last = self.armed = time.monotonic()
        self.told = False
        self.ended = threading.Event()
        if DUMP is not None:
            faulthandler.register(DUMP, self.file)
        self.arm()
        threading.Thread(target=self.look, name="stall watch", daemon=True).start()

    def is_alive(self, step: int) -> None:
        """Cheap: the alarm is set anew after a twentieth of the limit only, and goes off that much later."""
        now = time.monotonic()
        if self.told:
            log.warning("rank %d came alive again after %s, at step %d", self.rank, minutes(now - self.last), step)
            self.told = False
        self.step, self.last = step, now
        if now - self.armed > self.limit_s / PARTS:
            self.arm()

    def arm(self) -> None:
        self.armed = time.monotonic()
        faulthandler.cancel_dump_traceback_later()
        self.drop_unused_head()
        limit = minutes(self.limit_s)
        self.write(f"after step {self.step}, process {os.getpid()}; its stacks when nothing came for {limit}:")
        self.end = os.lseek(self.file, 0, os.SEEK_CUR)
        faulthandler.dump_traceback_later(self.limit_s * (1 + 1 / PARTS), file=self.file)

    def drop_unused_head(self) -> None:
        size = os.lseek(self.file, 0, os.SEEK_END)
        if size == self.end:
            os.ftruncate(self.file, self.head)
            os.lseek(self.file, self.head, os.SEEK_SET)
        else:
            self.head = size

    def write(self, line: str) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        os.write(self.file, f"\n{now}: {line}\n".encode())

    def look(self) -> None:
        """The second thread."""
        while not self.ended.wait(self.limit_s / PARTS):
            if not self.told and time.monotonic() - self.last > self.limit_s * (1 + 2 / PARTS):
                self.told = True
                self.tell()

    def tell(self) -> None:
        log.warning(
            "rank %d has made no step for %s, after step %d; what it and its data workers are at is in %s. It goes on "
            "if it can; guard.stall_minutes is the limit",
            self.rank,
            minutes(time.monotonic() - self.last),
            self.step,
            self.path,
        )
        self.write(f"no step for {minutes(time.monotonic() - self.last)} after step {self.step}")
        for child in multiprocessing.active_children():
            if DUMP is not None and child.pid is not None and hears(child.pid, DUMP):
                self.write(f"data worker, process {child.pid}:")
                with suppress(ProcessLookupError):
                    os.kill(child.pid, DUMP)
                self.ended.wait(WORKER_S)

    def close(self) -> None:
        """Workers that are there still keep what they inherited: the file stays open for them."""
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        if DUMP is not None:
            faulthandler.unregister(DUMP)
        self.drop_unused_head()
        os.close(self.file)
        if not self.path.stat().st_size:
            self.path.unlink()
            with suppress(OSError):  # other ranks' files
                self.path.parent.rmdir()


def hears(process: int, number: int) -> bool:
    """Whether the signal would not kill it: it was forked from this one, with the handler (Linux only)."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.3g} minutes"
