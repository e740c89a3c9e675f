"""Signals: a run that is asked to stop writes a checkpoint, and exits with a code that schedulers understand.

SIGTERM, SIGUSR1 (Slurm: the time limit is near) and SIGINT request a stop; a second Ctrl-C ends the process at once.
The exit code is 128 + the signal's number; after SIGUSR1 a Slurm job is requeued as well.

Each rank receives a signal at its own moment, but all must stop after the same step. So every step starts an
all-reduce of a flag without waiting for it, and reads the flag of ``LAG_STEPS`` earlier, which is the same on all
ranks. A rank that cannot finish its step, because of its data or another rank, is ended after ``grace_s``; the run then
resumes from the last checkpoint.

Lightning's handlers are replaced: they broadcast from within a signal handler, which can mix with the collectives of
the step, and its loop synchronises after every batch.
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
from types import FrameType
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import distributed

from ipa.identity import slurm_job
from ipa.training.checkpointing import Checkpoints, checkpoint_io
from ipa.training.hooks import TrainingCallback, callbacks_of, ends_step, send_to_host

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAG_STEPS = 2
KILLED_BY_SIGNAL = 128  # plus the signal's number: exit codes as a shell reports them

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """Ends a process that was asked to stop."""

    def __init__(self, number: int, code: int | None = None) -> None:
        super().__init__(KILLED_BY_SIGNAL + number if code is None else code)
        self.number = number


class Signals:
    """The signal that this process received. While ``interruptible`` it may stop at once."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.process = os.getpid()
        self.number: int | None = None
        self.interruptible = True
        self.launcher: _SubprocessScriptLauncher | None = None
        self.timer: threading.Timer | None = None

    @contextmanager
    def listening(self) -> Iterator[Signals]:
        """Handle signals in the main thread; those that are ignored, as with nohup, stay ignored."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        try:
            for number in STOP_SIGNALS:
                if before[number] is not signal.SIG_IGN:
                    signal.signal(number, self.receive)
            yield self
        finally:
            self.cancel_timer()
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler: raises Stopped where that is safe, otherwise leaves the signal to the end of the step."""
        if os.getpid() != self.process:
            return  # a forked child
        if number == signal.SIGINT and self.number is not None:
            os._exit(KILLED_BY_SIGNAL + number)
        if self.number is not None:
            return
        self.number = number
        self.timer = threading.Timer(self.grace_s, self.give_up)
        self.timer.daemon = True
        self.timer.start()
        if self.interruptible:
            self.end(number)
        log.info("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)

    def end(self, number: int) -> NoReturn:
        if self.launcher is not None:
            self.launcher.kill(signal.SIGTERM)  # the other ranks would wait for this one
        raise Stopped(number)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """For long work that may be interrupted at any moment: raises Stopped, at once if a signal came before."""
        before, self.interruptible = self.interruptible, True
        try:
            if self.number is not None:
                self.end(self.number)
            yield
        finally:
            self.interruptible = before

    def give_up(self) -> None:
        """Runs in the timer's thread: the main thread may hang in a collective."""
        assert self.number is not None
        log.error("the step did not end within %g s (stop.grace_s), so the process ends now", self.grace_s)
        logging.shutdown()
        os._exit(KILLED_BY_SIGNAL + self.number)

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


def send_flag(number: int, device: torch.device) -> Callable[[], list[float]]:
    """Start an all-reduce of the highest signal number of any rank; the function returned waits and reads it."""
    value = torch.tensor([number], dtype=torch.int32).to(device, non_blocking=True)
    work = distributed.all_reduce(value, distributed.ReduceOp.MAX, async_op=True)
    if device.type == "cuda":
        work.wait()  # the stream waits, not the host
        return send_to_host(value)

    def read() -> list[float]:
        work.wait()
        return value.tolist()

    return read


class StopOnSignal(Checkpoint):
    """Stops all ranks after the same step; the caller raises ``end``. Lightning calls a ``Checkpoint`` last."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self.end: Stopped | None = None
        self.flags: deque[Callable[[], list[float]]] = deque()
        self.between_steps = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        replace_handlers(trainer, lambda: self.ready(trainer, pl_module))

    def ready(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called when everything is loaded."""
        self.wait_for_data(trainer)
        for callback in callbacks_of(trainer, TrainingCallback):
            callback.on_ready(trainer, pl_module)

    def on_train_batch_start(self, *args: Any) -> None:
        self.signals.interruptible = self.between_steps = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if ends_step(trainer, batch_idx):
            if number := self.agreed(trainer):
                self.stop(trainer, pl_module, number)
                trainer.should_stop = True  # after the step is logged
            else:
                self.wait_for_data(trainer)

    def stop(self, trainer: L.Trainer, pl_module: Any, number: int) -> None:
        self.save(trainer, pl_module, number)
        self.end = Stopped(number, exit_code_of(trainer))

    def wait_for_data(self, trainer: L.Trainer) -> None:
        """One process may stop while it waits; several have to agree on a step."""
        self.between_steps = True
        self.signals.interruptible = trainer.world_size == 1

    def agreed(self, trainer: L.Trainer) -> int:
        """The signal for which all ranks stop now; 0 for none."""
        received = self.signals.number or 0
        if trainer.world_size == 1:
            return received
        self.flags.append(send_flag(received, trainer.strategy.root_device))
        return int(self.flags.popleft()()[0]) if len(self.flags) > LAG_STEPS else 0

    def save(self, trainer: L.Trainer, pl_module: Any, number: int) -> None:
        """Returns on all ranks once the first has written."""
        self.signals.cancel_timer()
        for checkpoints in callbacks_of(trainer, Checkpoints):
            checkpoints.save(trainer, pl_module)
            checkpoint_io(trainer).wait()
        trainer.strategy.barrier("stopped")
        if trainer.is_global_zero:
            name, step = signal.Signals(number).name, trainer.global_step
            log.info("%s: stopped after step %d of %d; the same command resumes", name, step, trainer.max_steps)
            if name == "SIGUSR1":
                requeue(os.environ)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The handler interrupted the only process while it waited for data."""
        if isinstance(exception, Stopped) and self.between_steps and trainer.world_size == 1:
            self.signals.interruptible = False
            self.save(trainer, pl_module, exception.number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the flags of the last steps, after which there was no step to stop at."""
        number = int(max((read()[0] for read in self.flags), default=0))
        self.flags.clear()
        if number and self.end is None:
            self.stop(trainer, pl_module, number)
        self.between_steps = False
        self.signals.interruptible = True


def replace_handlers(trainer: Any, ready: Callable[[], None]) -> None:
    """Call ``ready`` when Lightning would install its handlers. A test checks that the private names still exist."""
    trainer._signal_connector.register_signal_handlers = ready
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def launcher_of(trainer: L.Trainer) -> _SubprocessScriptLauncher | None:
    """Lightning's launcher of this machine's other ranks, if it started them from this process."""
    launcher = trainer.strategy.launcher
    return launcher if isinstance(launcher, _SubprocessScriptLauncher) else None


def exit_code_of(trainer: L.Trainer) -> int | None:
    """0 for a rank that Lightning started: it takes any other code for a crash and kills the first process."""
    environment = getattr(trainer.strategy, "cluster_environment", None)  # a single process has none
    return 0 if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0 else None


def requeue(environment: Mapping[str, str]) -> None:
    """Ask Slurm to requeue this job, if it is one, and log the answer."""
    job = slurm_job(environment)
    if job is None:
        return
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        log.warning("scontrol was not found, so job %s is not requeued: submit it again", job)
        return
    answer = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True)
    if answer.returncode:
        log.warning("job %s was not requeued: %s", job, (answer.stderr or answer.stdout).strip())
    else:
        log.info("job %s is requeued", job)
