"""Data workers: how they outlive signals, and that a batch which cannot be sent ends the training.

Workers send batches through shared memory, of which a container has 64 MB by default.
"""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import traceback
from pathlib import Path
from typing import Any

from ipa.errors import UserError

LONGER_S = 20  # than the main process, which the signal may reach later
PREFETCH = 2  # batches that a worker makes ahead
SHARED_MEMORY = Path("/dev/shm")
MB = 1_000_000


def begin(worker: int, grace_s: float) -> None:
    """Keep running after a signal to the whole group, as Slurm and a terminal send it.

    The main process finishes its step and may need batches for ``grace_s`` more. A loader ends stuck workers with
    SIGTERM, so that is not ignored: it sets an alarm.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, grace_s + LONGER_S))
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(die)  # type: ignore[attr-defined]


def die(error: BaseException, batch: Any) -> None:
    """End the worker for a batch that it cannot send; Python would drop it, and training would wait for it forever."""
    traceback.print_exception(error)
    os.kill(os.getpid(), signal.SIGBUS)  # torch reports it as a lack of shared memory


def check_shared_memory(batch_bytes: int, workers: int, folder: Path = SHARED_MEMORY) -> None:
    """Raise UserError if the batches that ``workers`` make ahead do not fit into what is free."""
    if not folder.is_dir():
        return
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    needed = PREFETCH * workers * batch_bytes
    if needed > free:
        raise UserError(
            f"{workers} data workers need {needed / MB:,.1f} MB of shared memory for batches of "
            f"{batch_bytes / MB:,.1f} MB, but {folder} has {free / MB:,.1f} MB free: make it larger (docker run "
            "--shm-size=8g), or give fewer data.num_workers= (0 needs none) or a smaller data.batch_size="
        )
