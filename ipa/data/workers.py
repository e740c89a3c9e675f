"""What a data worker does about signals, which reach it along with the process that it works for."""

from __future__ import annotations

import signal

LONGER_S = 20  # than the main process, which the signal may reach later


def begin(worker: int, grace_s: float) -> None:
    """Outlive a signal to the whole group, as Slurm and a terminal send it, while the main process ends its step.

    It may want batches for ``grace_s`` more. SIGTERM is also how a loader ends a worker that does not end by itself, so
    it is not ignored: it sets an alarm.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, grace_s + LONGER_S))
