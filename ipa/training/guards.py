"""A training step whose loss or gradient is not finite changes nothing.

    skip = max over ranks [loss not finite, ‖gradient‖ not finite]

stays on the device: torch's fused optimizers read it as ``found_inf``, the average of the weights reads it too, and the
host a few steps later. The step number and the learning rate schedule advance, because the samples were consumed.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from ipa.distributed import gather, max_over_ranks
from ipa.errors import UserError
from ipa.training.hooks import Order, TrainingCallback, ends_step, is_due, logs_now, send_to_host
from ipa.training.strategies import local

LAG_STEPS = 2  # the host waits if the device lags further
MAX_KEYS = 64  # named in a message
CHOICES = ("stop", "skip")

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    key: str
    shard: str
    error: float


class StepRecord(NamedTuple):
    """One step: keys and shards of its samples; ``read`` gives two flags (loss, gradient) and each sample's error."""

    step: int
    keys: list[str]
    shards: list[str]
    read: Callable[[], list[float]]


class FiniteGuard(TrainingCallback):
    """Skips a step whose loss or gradient is not finite; then stops the run, or counts the step and continues.

    ``on_nonfinite`` is stop or skip; with skip, ``most_skips`` such steps in a row stop the run. Flags are read after
    ``LAG_STEPS`` more steps (on the CPU at once), before every checkpoint, every ``settle_every_n_steps`` and at the
    last step. All ranks read the same flags at the same step, then gather the samples that caused them.

    With a GradScaler an infinite gradient is normal, since that is how it finds its scale: only the loss counts.
    """

    order = Order.GUARD

    def __init__(self, on_nonfinite: str = "stop", most_skips: int = 10, settle_every_n_steps: int = 0) -> None:
        if on_nonfinite not in CHOICES:
            raise UserError(f"guard.on_nonfinite={on_nonfinite}: give one of {', '.join(CHOICES)}")
        self.skips = on_nonfinite == "skip"
        self.most_skips = most_skips
        self.settle_every_n_steps = settle_every_n_steps
        self.skipped = self.in_a_row = 0
        self.reset()

    def reset(self) -> None:
        self.losses: list[Tensor] = []
        self.keys: list[str] = []  # whole batches would keep their images on the device
        self.shards: list[str] = []
        self.errors: list[Tensor] = []
        self.records: deque[StepRecord] = deque()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.reset()
        self.level = logging.WARNING if trainer.is_global_zero else logging.DEBUG
        self.is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        for optimizer in trainer.optimizers:
            # Lightning refuses to clip gradients of a fused optimizer, which can unscale them itself, even in bfloat16
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.losses.append(loss.detach().float())

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Called after the gradients of all ranks were reduced, before they are clipped."""
        values = torch.stack([torch.stack(self.losses).sum(), gradient_norm(optimizer, self.losses[0].device)])
        self.flags = max_over_ranks((~torch.isfinite(values)).float())
        self.losses = []
        pl_module.skip = self.flags.max()
        skip_step(optimizer, pl_module.skip)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.keys += batch.keys
        self.shards += batch.shards
        self.errors.append(outputs["errors"].error_B.detach().float())
        if not ends_step(trainer, batch_idx):
            return
        numbers = torch.cat([self.flags, *self.errors])
        self.records.append(StepRecord(trainer.global_step, self.keys, self.shards, send_to_host(numbers)))
        self.keys, self.shards, self.errors = [], [], []
        lags = numbers.device.type == "cuda" and not is_due(trainer, batch_idx, self.settle_every_n_steps)
        self.read_all_but(LAG_STEPS if lags else 0)
        if self.skips and logs_now(trainer, batch_idx):
            pl_module.log("train/skipped_steps", float(self.skipped), rank_zero_only=True)

    def before_checkpoint(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Wait for the flags of all steps; raises UserError if one was bad."""
        self.read_all_but(0)

    def read_all_but(self, lag: int) -> None:
        while len(self.records) > lag:
            self.read(self.records.popleft())

    def read(self, record: StepRecord) -> None:
        loss, gradient, *errors = record.read()
        if not loss and (self.is_scaled or not gradient):
            self.in_a_row = 0
            return
        samples = [Sample(*each) for each in zip(record.keys, record.shards, errors, strict=True)]
        of_all_ranks = [sample for own in gather(samples) for sample in own]
        what = describe_step(record.step, "loss" if loss else "gradient", of_all_ranks)
        self.skipped += 1
        self.in_a_row += 1
        if not self.skips:
            raise UserError(f"{what} Training stopped, and this step was not applied. {ADVICE} {SKIP}")
        if self.in_a_row >= self.most_skips:
            raise UserError(f"{what} {self.in_a_row} steps in a row were skipped (guard.most_skips). {ADVICE}")
        log.log(self.level, "%s The step is skipped; %d skipped so far.", what, self.skipped)

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


ADVICE = (
    "If the samples are good, try a smaller optimizer.lr or trainer.gradient_clip_val=1 in a new run; the same command "
    "resumes from the last checkpoint, if there is one."
)
SKIP = "guard.on_nonfinite=skip skips and counts such steps."


def describe_step(step: int, what: str, samples: list[Sample]) -> str:
    """Name the samples whose error is not finite, or all samples of the step if there is none."""
    bad = [sample for sample in samples if not math.isfinite(sample.error)]
    value = f"{bad[0].error}" if bad and what == "loss" else "not finite"
    whose = "Caused by" if bad else "The error of each sample is finite; the samples of the step are"
    named = bad or samples
    shards = ", ".join(sorted({sample.shard for sample in named}))
    keys = ", ".join(sample.key for sample in named[:MAX_KEYS])
    more = f" and {len(named) - MAX_KEYS} more" if len(named) > MAX_KEYS else ""
    return f"the {what} of step {step} is {value}. {whose}: shards {shards}; keys {keys}{more}."


def gradient_norm(optimizer: Optimizer, device: torch.device) -> Tensor:
    """Norm of this rank's gradients, in float32: float16 overflows above 65504."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = local(parameter.grad for parameter in parameters if parameter.grad is not None)
    if not gradients:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))


def skip_step(optimizer: Any, skip: Tensor) -> None:
    """Make the optimizer's next step do nothing where ``skip`` is 1."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = skip
    elif bool(skip):  # waits for the device
        optimizer.zero_grad(set_to_none=True)
