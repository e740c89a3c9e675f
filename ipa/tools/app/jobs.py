"""The jobs of all users, one after another on one thread; each can be cancelled between two steps.

    queue = Queue()
    job = queue.submit(session, calls=2, work=lambda job: make(…))
    async for words in queue.watch(session, job): …

Only this thread uses the model, so users cannot interfere with each other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Lock
from typing import Any, Self

from ipa.errors import UserError

POLL_S = 0.2


class Cancelled(Exception):
    """The user has cancelled the job."""


class Job:
    """One or several ``calls`` of a pipeline; it replaces the pipeline's progress bar."""

    def __init__(self, calls: int) -> None:
        self.calls, self.call, self.step, self.num_steps = calls, 0, 0, 0
        self.began: float | None = None
        self.stop = Event()
        self.future: Future[Any] = Future()

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Self:
        """What diffusers pipelines call before their first step."""
        self.call, self.step, self.num_steps = self.call + 1, 0, total or 1
        self.began = self.began or time.monotonic()
        self.check()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, steps: int = 1) -> None:
        """After each step; raises Cancelled, which ends the pipeline."""
        self.step += steps
        self.check()

    def check(self) -> None:
        if self.stop.is_set():
            raise Cancelled

    @property
    def fraction(self) -> float:
        """The fraction of all steps that is done."""
        return max(self.call - 1 + self.step / max(self.num_steps, 1), 0) / self.calls

    @property
    def remaining_s(self) -> float | None:
        """None before the first step."""
        if self.began is None or not self.fraction:
            return None
        return (time.monotonic() - self.began) * (1 / self.fraction - 1)


class Queue:
    """At most one job per session, by the session's name, in the order in which they came."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "model")
        self.jobs: dict[str, Job] = {}
        self.lock = Lock()

    def submit(self, session: str, calls: int, work: Callable[[Job], Any]) -> Job:
        """Raises UserError if the session has a job."""
        job = Job(calls)
        with self.lock:
            if session in self.jobs:
                raise UserError("your last images are not ready yet: wait for them, or cancel them")
            self.jobs[session] = job
            job.future = self.thread.submit(self.run, job, work)
        job.future.add_done_callback(lambda _: self.forget(session))
        return job

    @staticmethod
    def run(job: Job, work: Callable[[Job], Any]) -> Any:
        job.check()
        return work(job)

    def forget(self, session: str) -> None:
        with self.lock:
            self.jobs.pop(session, None)

    def ahead(self, session: str) -> int:
        """The number of jobs before this one."""
        with self.lock:
            return list(self.jobs).index(session) if session in self.jobs else 0

    def cancel(self, session: str) -> None:
        """The session's job, if it has one, ends after its current step, or never starts."""
        with self.lock:
            job = self.jobs.get(session)
        if job is not None:
            job.stop.set()
            job.future.cancel()

    async def watch(self, session: str, job: Job) -> AsyncIterator[tuple[float, str]]:
        """The fraction done and a message for the user, until the job ends; closing the watcher cancels the job."""
        try:
            while not job.future.done():
                yield job.fraction, self.describe(session, job)
                await asyncio.sleep(POLL_S)
        finally:
            if not job.future.done():
                self.cancel(session)

    def describe(self, session: str, job: Job) -> str:
        if job.stop.is_set():
            return "Cancelling after this step …"
        if ahead := self.ahead(session):
            return f"Waiting: {ahead} {'job is' if ahead == 1 else 'jobs are'} before yours"
        if not job.num_steps:
            return "Reading the pictures …"
        part = f"part {job.call} of {job.calls}, " if job.calls > 1 else ""
        left = "" if job.remaining_s is None else f", about {job.remaining_s + 0.5:.0f} s left"
        return f"Step {job.step} of {job.num_steps}{', ' if part else ''}{part.removesuffix(', ')}{left}"

    def close(self) -> None:
        """Cancel everything, so that the process can end."""
        for session in list(self.jobs):
            self.cancel(session)
        with suppress(CancelledError):
            self.thread.shutdown(cancel_futures=True)
