"""What goes wrong, on purpose, in a real run: callbacks that spoil one step or hang, and one that looks what it did."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch

PATIENCE_S = 100.0


def overrides(name: str, **values: Any) -> list[str]:
    """Of a run that has this module's callback ``name``."""
    values = {"_target_": f"{__name__}.{name}", **values}
    return [f"+callbacks.{name.lower()}.{key}={value}" for key, value in values.items()]


class Poison(L.Callback):
    """A number in the noise of one sample, or in one weight's gradient, of one rank at some steps."""

    def __init__(self, steps: list[int], rank: int = 0, value: str = "nan", where: str = "noise") -> None:
        self.steps, self.rank, self.value, self.where = steps, rank, float(value), where
        self.keys: list[str] = []

    def is_due(self, trainer: L.Trainer, where: str) -> bool:
        return (where, trainer.global_rank) == (self.where, self.rank) and trainer.global_step + 1 in self.steps

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.is_due(trainer, "noise"):
            batch.draws.noise_BCHW[1] = self.value
            batch.draws.drop_image_B[1] = False

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.is_due(trainer, "gradient"):
            next(pl_module.model.trainable.parameters()).grad.view(-1)[0] = self.value


class Probe(L.Callback):
    """Writes for every step whether weights, moments and average of this rank are others after it, a line each."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.before: list[torch.Tensor] | None = None

    def state(self, trainer: L.Trainer, pl_module: Any) -> list[torch.Tensor]:
        values = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        average = pl_module.average
        averaged = [] if average is None else [*average.averaged, average.count]
        tensors = [*pl_module.model.trainable.parameters(), *values, *averaged]
        return [getattr(tensor, "to_local", lambda t=tensor: t)().detach().clone() for tensor in tensors]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now, before = self.state(trainer, pl_module), self.before
        self.before = now
        if before is None or len(before) != len(now):
            return
        same = [torch.equal(one, other) for one, other in zip(before, now, strict=True)]
        line = {"step": trainer.global_step, "rank": trainer.global_rank, "changed": same.count(False), "of": len(same)}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Greedy(L.Callback):
    """Asks for more memory than any machine has, at step 2."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            torch.empty(1 << 60, dtype=torch.uint8)


class BadSource(L.Callback):
    """The sixth record of the first source kills the data worker."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        source = trainer.datamodule.train_order.sources[0]  # type: ignore[attr-defined]
        object.__setattr__(source, "read", lambda shard, read=source.read: self.read(read(shard)))

    def read(self, records: Iterator[Any]) -> Iterator[Any]:
        for number, record in enumerate(records):
            if number == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            yield record


class HangingStep(L.Callback):
    """Step 2 does not end until ``file`` has the stacks."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 1:
            hang_in_step(self.file)


def hang_in_source() -> None:
    time.sleep(PATIENCE_S)


def hang_in_step(file: Path) -> None:
    wait_until(lambda: has_stack(file, "Timeout", "hang_in_step"))


def has_stack(file: Path, *words: str) -> bool:
    """Whether the words are there, in this order."""
    text = file.read_text() if file.exists() else ""
    for word in words:
        _, found, text = text.partition(word)
        if not found:
            return False
    return True


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)


def hold_the_interpreter(seconds: int) -> None:
    """In C, with Python's lock, so that no other thread runs Python."""
    ctypes.PyDLL(None).sleep(seconds)
