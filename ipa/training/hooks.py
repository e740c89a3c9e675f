"""What our callbacks share: their order, two more hooks, when something is due, and reading from the device late."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

import lightning as L
import torch
from torch import Tensor

Kind = TypeVar("Kind", bound=L.Callback)


class Order(IntEnum):
    """When a callback runs after a step, whatever its position in the configuration."""

    DATA = 0  # a checkpoint holds the position in the data after its step
    GUARD = 1  # nothing is written of a step that failed
    MONITOR = 2  # the checkpoint holds the log's row of its step
    EXPORT = 3
    CHECKPOINT = 4
    PREVIEW = 5  # slow, so nothing is lost if the run is killed meanwhile
    PROGRESS = 6
    LAST = 7


class TrainingCallback(L.Callback):
    """A callback with a place in the order and the hooks that Lightning lacks; all ranks call them together."""

    order: ClassVar[Order] = Order.MONITOR

    def on_ready(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Everything is loaded; the next step, if there is one, comes next."""

    def before_checkpoint(self, trainer: L.Trainer, pl_module: Any) -> None:
        """A checkpoint is about to be written; raise to prevent it."""


def in_order(callbacks: Iterable[L.Callback]) -> list[L.Callback]:
    """Sort callbacks by their order; those of other classes count as monitors."""
    return sorted(callbacks, key=lambda each: each.order if isinstance(each, TrainingCallback) else Order.MONITOR)


def callbacks_of(trainer: L.Trainer, kind: type[Kind]) -> list[Kind]:
    return [each for each in trainer.callbacks if isinstance(each, kind)]  # type: ignore[attr-defined]


def is_due(trainer: L.Trainer, batch_idx: int, every_n_steps: int) -> bool:
    """Whether work that is done every ``every_n_steps`` and at the last step is due; 0 means at the last step only."""
    return ends_step(trainer, batch_idx) and falls_on(trainer.global_step, trainer.max_steps, every_n_steps)


def logs_now(trainer: Any, batch_idx: int) -> bool:
    return is_due(trainer, batch_idx, trainer.log_every_n_steps)


def falls_on(step: int, max_steps: int, every_n_steps: int) -> bool:
    return step == max_steps or (every_n_steps > 0 and step > 0 and step % every_n_steps == 0)


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this batch ended an optimizer step; with gradient accumulation not every batch does."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def send_to_host(values: Tensor) -> Callable[[], list[float]]:
    """Start copying ``values`` to the host; the function returned waits for the copy and returns the numbers."""
    if values.device.type != "cuda":
        return values.tolist
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> list[float]:
        event.synchronize()
        return copy.tolist()

    return read
