"""Signals: a run that is told to stop writes a checkpoint first, and ends with a code that schedulers understand.

SIGTERM (preemption, ``scancel``, ``kill``), SIGUSR1 (Slurm's ``--signal=USR1@120``: the time is nearly over) and SIGINT
(Ctrl-C) ask for a stop. The exit code is 128 + the signal's number; after SIGUSR1 a Slurm job is requeued as well. A
second Ctrl-C ends the process at once.

Each rank hears for itself, at a moment of its own, but all have to stop after the same step. So every step sends a
flag through an all-reduce that nobody waits for, and reads the flag of ``LAG_STEPS`` before, which is the same on all
ranks. A rank that is kept from the end of its step, by its data or by another rank, is ended after ``grace_s``: then
the last checkpoint is what the run goes on from.

Lightning's own handlers are replaced. They broadcast from within a signal handler, where that mixes with the step's
collectives, and its loop waits for the device after every batch to tell the ranks.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor, distributed

from ipa.identity import slurm_job
from ipa.training.checkpointing import Checkpoints, ends_step, writer

HEARD = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
LAG_STEPS = 2
KILLED_BY_SIGNAL = 128  # plus the signal's number, the exit code of a shell

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """The end of a process that was asked to stop."""

    def __init__(self, number: int, code: int | None = None) -> None:
        super().__init__(KILLED_BY_SIGNAL + number if code is None else code)
        self.number = number


class Signals:
    """What this process was asked. ``obey`` says that nothing is under way, so that it can end at once."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.process = os.getpid()
        self.number: int | None = None
        self.obey = True
        self.launcher: _SubprocessScriptLauncher | None = None
        self.timer: threading.Timer | None = None

    @contextmanager
    def listening(self) -> Iterator[Signals]:
        """A signal that is ignored, as nohup's is or a background job's Ctrl-C, stays so. For the main thread."""
        before = {number: signal.getsignal(number) for number in HEARD}
        try:
            for number in HEARD:
                if before[number] is not signal.SIG_IGN:
                    signal.signal(number, self.hear)
            yield self
        finally:
            self.cancel_timer()
            for number, handler in before.items():
                signal.signal(number, handler)

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The handler; raises Stopped where that is safe, otherwise the end of the step will see it."""
        if os.getpid() != self.process:
            return  # a child that was forked
        if number == signal.SIGINT and self.number is not None:
            os._exit(KILLED_BY_SIGNAL + number)
        if self.number is None:
            self.number = number
            self.begin_to_stop(number)

    def begin_to_stop(self, number: int) -> None:
        self.timer = threading.Timer(self.grace_s, self.give_up)
        self.timer.daemon = True
        self.timer.start()
        if self.obey:
            self.end(number)
        log.info("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)

    def end(self, number: int) -> NoReturn:
        if self.launcher is not None:
            self.launcher.kill(signal.SIGTERM)  # the other ranks, which would wait for this one
        raise Stopped(number)

    @contextmanager
    def obeying(self) -> Iterator[None]:
        """For long work that can be left at any moment; raises Stopped, at once where a signal came before."""
        before, self.obey = self.obey, True
        try:
            if self.number is not None:
                self.end(self.number)
            yield
        finally:
            self.obey = before

    def give_up(self) -> None:
        """In the timer's thread, since the main one may hang in a collective."""
        assert self.number is not None
        log.error("the step did not end within %g s (stop.grace_s), so the process ends without it", self.grace_s)
        logging.shutdown()
        os._exit(KILLED_BY_SIGNAL + self.number)

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


@dataclass
class Flag:
    """The highest signal number of any rank after one step, on its way."""

    value: Tensor
    arrived: Callable[[], object]

    @classmethod
    def sent(cls, number: int, device: torch.device) -> Flag:
        value = torch.tensor([number], dtype=torch.int32).to(device, non_blocking=True)
        work = distributed.all_reduce(value, distributed.ReduceOp.MAX, async_op=True)
        if device.type != "cuda":
            return cls(value, work.wait)
        work.wait()  # makes the stream wait, not this process
        copy = torch.empty(1, dtype=torch.int32, pin_memory=True).copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(copy, event.synchronize)

    def read(self) -> int:
        self.arrived()
        return int(self.value)


class StopOnSignal(Checkpoint):
    """Stops all ranks after the same step, with a checkpoint; ``end`` is then to be raised when the fit is over.

    It is a ``Checkpoint``, since Lightning calls those last.
    """

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self.end: Stopped | None = None
        self.flags: deque[Flag] = deque()
        self.between_steps = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        replace_handlers(trainer, lambda: self.ready(trainer, pl_module))

    def ready(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All is loaded, and training, if any is left, comes next; tells the callbacks that have an ``on_ready``."""
        self.wait_for_data(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if (hook := getattr(callback, "on_ready", None)) is not None:
                hook(trainer, pl_module)

    def on_train_batch_start(self, *args: Any) -> None:
        self.signals.obey = self.between_steps = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if ends_step(trainer, batch_idx):
            if number := self.agreed(trainer):
                self.stop(trainer, pl_module, number)
                trainer.should_stop = True  # when the step's values are logged
            else:
                self.wait_for_data(trainer)

    def stop(self, trainer: L.Trainer, pl_module: Any, number: int) -> None:
        self.save(trainer, pl_module, number)
        self.end = Stopped(number, exit_code_of(trainer))

    def wait_for_data(self, trainer: L.Trainer) -> None:
        """One process can be stopped while it waits; several have to agree on a step, so they wait for the next."""
        self.between_steps = True
        self.signals.obey = trainer.world_size == 1

    def agreed(self, trainer: L.Trainer) -> int:
        """The number of the signal for which all ranks stop now; 0 for none."""
        heard = self.signals.number or 0
        if trainer.world_size == 1:
            return heard
        self.flags.append(Flag.sent(heard, trainer.strategy.root_device))
        return self.flags.popleft().read() if len(self.flags) > LAG_STEPS else 0

    def save(self, trainer: L.Trainer, pl_module: Any, number: int) -> None:
        """Returns on all ranks when the first has written."""
        self.signals.cancel_timer()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.save(trainer, pl_module)
                writer(trainer).wait()
        trainer.strategy.barrier("stopped")
        if trainer.is_global_zero:
            name, step = signal.Signals(number).name, trainer.global_step
            log.info("%s: stopped after step %d of %d; the same command goes on", name, step, trainer.max_steps)
            if name == "SIGUSR1":
                requeue(os.environ)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The handler stopped the only process while it waited for data."""
        if isinstance(exception, Stopped) and self.between_steps and trainer.world_size == 1:
            self.signals.obey = False
            self.save(trainer, pl_module, exception.number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The flags of the last steps tell of a signal for which there was no step left."""
        number = max((flag.read() for flag in self.flags), default=0)
        self.flags.clear()
        if number and self.end is None:
            self.stop(trainer, pl_module, number)
        self.between_steps = False
        self.signals.obey = True


def replace_handlers(trainer: Any, ready: Callable[[], None]) -> None:
    """Leave signals to this module, which is ready when Lightning would begin to listen.

    The names are private, so a test sees whether they are still there.
    """
    trainer._signal_connector.register_signal_handlers = ready
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def launcher_of(trainer: L.Trainer) -> _SubprocessScriptLauncher | None:
    """What starts this machine's other ranks, when it is Lightning, and this process the first."""
    launcher = trainer.strategy.launcher
    return launcher if isinstance(launcher, _SubprocessScriptLauncher) else None


def exit_code_of(trainer: L.Trainer) -> int | None:
    """A rank that Lightning started ends well: it would take any other end for a crash and kill the first process."""
    environment = getattr(trainer.strategy, "cluster_environment", None)  # one process alone has none
    return 0 if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0 else None


def requeue(environment: Mapping[str, str]) -> None:
    """Ask Slurm to start this job again, if it is one; what Slurm answers is told."""
    job = slurm_job(environment)
    if job is None:
        return
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        log.warning("scontrol is not here, so job %s is not requeued; submit it once more", job)
        return
    answer = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True)
    if answer.returncode:
        log.warning("job %s was not requeued: %s", job, (answer.stderr or answer.stdout).strip())
    else:
        log.info("job %s is requeued", job)
