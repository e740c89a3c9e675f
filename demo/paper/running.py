"""Runs jobs side by side, one thread each, with one progress bar over all of them and the time that is left.

Each job writes its messages to FOLDER/console.log. A signal stops all jobs, which resume when the command is repeated.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

from tqdm import tqdm

from demo.paper import ROOT
from demo.paper.plan import Job, executable
from ipa.errors import UserError

PR_SET_PDEATHSIG = 1
POLL_S = 0.5
STOP_S = 60  # a training writes its checkpoint first
TAIL = 12  # lines of the log of a job that failed


@dataclass
class Running:
    job: Job
    log: IO[bytes]
    remaining: list[tuple[str, ...]]
    process: subprocess.Popen[bytes] | None = field(default=None)

    def is_busy(self) -> bool:
        """Start the next command when one has ended; raises UserError for one that failed."""
        code = None if self.process is None else self.process.poll()
        if self.process is not None and code is None:
            return True
        if code:
            raise UserError(f"{self.job.name} failed:\n{self.tail()}\n\nThe command was: {self.job.shown()}")
        if not self.remaining:
            return False
        self.process = start(self.remaining.pop(0), self.log)
        return True

    def tail(self) -> str:
        self.log.flush()
        return "\n".join((self.job.folder / "console.log").read_text(errors="replace").splitlines()[-TAIL:])


def start(command: tuple[str, ...], log: IO[bytes]) -> subprocess.Popen[bytes]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        executable(command),
        env=variables,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches it once, as our signal
        preexec_fn=die_with_parent if sys.platform == "linux" else None,
    )


def die_with_parent() -> None:
    """A killed command leaves no trainings behind that would block its successor."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def begin(job: Job) -> Running:
    for command in job.shown():
        tqdm.write(command, file=sys.stderr)
    job.folder.mkdir(parents=True, exist_ok=True)
    return Running(job, (job.folder / "console.log").open("ab"), list(job.commands))


def run_jobs(jobs: Sequence[Job], at_a_time: int, title: str) -> None:
    """Run those that are not done; raises UserError for the first that fails, and stops the others."""
    waiting = [job for job in jobs if not job.is_done()]
    if not waiting:
        return
    order = sorted(waiting, key=lambda job: -job.seconds)  # the longest first, so that all end together
    running: list[Running] = []
    ended = 0.0
    bar = tqdm(
        total=round(sum(job.seconds for job in waiting)),
        desc=title,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
        mininterval=1 if sys.stderr.isatty() else 60,
    )
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        while order or running:
            while order and len(running) < at_a_time:
                running.append(begin(order.pop(0)))
            for each in [each for each in running if not each.is_busy()]:
                running.remove(each)
                each.log.close()
                ended += each.job.seconds
                if not each.job.is_done():
                    raise UserError(f"{each.job.name} ended without its result; see {each.log.name}")
            partly = sum(each.job.seconds * each.job.progress() for each in running)
            bar.set_postfix_str(", ".join(each.job.name for each in running), refresh=False)
            bar.update(max(0, round(ended + partly) - bar.n))
            time.sleep(POLL_S)
    finally:
        stop(running)
        signal.signal(signal.SIGTERM, before)
        bar.close()


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def stop(running: Sequence[Running]) -> None:
    """Ask the processes to end, and wait."""
    alive = [each.process for each in running if each.process is not None and each.process.poll() is None]
    for process in alive:
        process.terminate()
    for process in alive:
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
