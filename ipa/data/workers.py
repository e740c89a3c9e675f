"""What a data worker does about signals, which reach it along with the process that it works for."""

from __future__ import annotations

import signal

GRACE_S = 45  # the main process may want batches for so long after a SIGTERM, to come to the end of its step


def begin(worker: int) -> None:
    """Outlive a signal to the whole group, as Slurm and a terminal send it, while the main process ends its step.

    SIGTERM is also how a loader ends a worker that does not end by itself, so it is not ignored: it sets an alarm.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))
