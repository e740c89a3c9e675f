"""What a run must not take in: numbers that are not finite, and frozen weights that moved.

A step whose loss or gradient is NaN or infinite is left out on the device, without anybody waiting for it:

    left out = max over ranks [loss not finite, ‖gradient‖ not finite]

is what torch's fused optimizers know as ``found_inf``, and the weights' average reads it, too. The host reads the flag
some steps later. So the weights, the moments and the average stay as they were to the bit; the number of the step and
the learning rate's schedule go on, since the samples were used up.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ipa.distributed import gather, max_over_ranks
from ipa.errors import UserError
from ipa.training.checkpointing import ends_step, is_due
from ipa.training.strategies import local
from ipa.types import Batch

LAG_STEPS = 2  # the device is not further behind than that, and if it is, the host waits for it
MOST_KEYS = 64  # named in a message

CHOICES = ("stop", "skip")
LOSS, GRADIENT = 0, 1  # places of the flags

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    key: str
    shard: str
    error: float


@dataclass
class StepRecord:
    """What one step was made of. ``numbers`` are two flags and the errors of its samples, on their way to the host."""

    step: int
    keys: list[str]
    shards: list[str]
    numbers: Tensor
    arrived: Callable[[], object]

    @classmethod
    def sent(cls, step: int, keys: list[str], shards: list[str], numbers: Tensor) -> StepRecord:
        if numbers.device.type != "cuda":
            return cls(step, keys, shards, numbers, lambda: None)
        copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(step, keys, shards, copy, event.synchronize)

    def read(self) -> tuple[bool, bool, list[Sample]]:
        """Whether any rank's loss, and the gradient, was not finite; this rank's samples."""
        self.arrived()
        loss, gradient, *errors = self.numbers.tolist()
        return bool(loss), bool(gradient), self.samples(errors)

    def samples(self, errors: list[float]) -> list[Sample]:
        return [Sample(*each) for each in zip(self.keys, self.shards, errors, strict=True)]


class FiniteGuard(L.Callback):
    """Keeps a step whose loss or gradient is not finite from the weights, and stops the run or counts it.

    ``on_nonfinite`` is stop or skip; then ``most_skips`` in a row stop the run. Flags are read when ``LAG_STEPS`` more
    steps are under way (on the CPU at once, where it costs nothing), before every checkpoint (``settle``), and at every
    ``settle_every_n_steps`` and the last: so it stands before all that writes files. All ranks read the same flags at
    the same step; then they tell each other which samples it was.

    Optimizers that are not fused know no gate. For them the host waits for the flag in every step and takes the
    gradients away, which torch's optimizers leave a parameter alone for. Under a GradScaler an infinite gradient is no
    fault, but how it finds its scale: only the loss counts, and the scaler leaves steps out by itself.
    """

    def __init__(self, on_nonfinite: str = "stop", most_skips: int = 10, settle_every_n_steps: int = 0) -> None:
        if on_nonfinite not in CHOICES:
            raise UserError(f"guard.on_nonfinite={on_nonfinite}: give one of {', '.join(CHOICES)}")
        if most_skips < 1:
            raise UserError(f"guard.most_skips={most_skips}: at least 1, or guard.on_nonfinite=stop")
        self.skips = on_nonfinite == "skip"
        self.most_skips = most_skips
        self.settle_every_n_steps = settle_every_n_steps
        self.skipped = self.in_a_row = 0
        self.begin()

    def begin(self) -> None:
        self.losses: list[Tensor] = []
        self.keys: list[str] = []  # and not the batches, which would keep the pictures of a whole step on the device
        self.shards: list[str] = []
        self.errors: list[Tensor] = []
        self.records: deque[StepRecord] = deque()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.begin()
        self.level = logging.WARNING if trainer.is_global_zero else logging.DEBUG  # all ranks would say the same
        self.is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        for optimizer in trainer.optimizers:
            # a fused one offers to unscale by itself, wherefore Lightning would refuse to clip, in bfloat16 even
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.losses.append(loss.detach().float())

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """After the ranks' gradients were put together, before they are clipped."""
        values = torch.stack([torch.stack(self.losses).sum(), gradient_norm(optimizer, self.losses[0].device)])
        self.flags = max_over_ranks((~torch.isfinite(values)).float())
        self.losses = []
        pl_module.left_out = self.flags.max()
        gate(optimizer, pl_module.left_out)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.keys += batch.keys
        self.shards += batch.shards
        self.errors.append(outputs["errors"].error_B.detach().float())
        if not ends_step(trainer, batch_idx):
            return
        numbers = torch.cat([self.flags, *self.errors])
        self.records.append(StepRecord.sent(trainer.global_step, self.keys, self.shards, numbers))
        self.keys, self.shards, self.errors = [], [], []
        lags = numbers.device.type == "cuda" and not is_due(trainer, batch_idx, self.settle_every_n_steps)
        self.read_all_but(LAG_STEPS if lags else 0)
        if self.skips and is_due(trainer, batch_idx, trainer.log_every_n_steps):  # type: ignore[attr-defined]
            pl_module.log("train/skipped_steps", float(self.skipped), rank_zero_only=True)

    def settle(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Wait for the flags of all steps made so far; raises UserError if one was bad. For all ranks together."""
        self.read_all_but(0)

    def read_all_but(self, lag: int) -> None:
        while len(self.records) > lag:
            self.read(self.records.popleft())

    def read(self, record: StepRecord) -> None:
        loss, gradient, samples = record.read()
        if not loss and (self.is_scaled or not gradient):
            self.in_a_row = 0
            return
        everyones = [sample for own in gather(samples) for sample in own]
        what = tell_step(record.step, "loss" if loss else "gradient", everyones)
        self.skipped += 1
        self.in_a_row += 1
        if not self.skips:
            raise UserError(f"{what} So training stopped there, with the weights as they were before. {ADVICE} {SKIP}")
        if self.in_a_row >= self.most_skips:
            row = f"Steps in a row that were left out: {self.in_a_row} (guard.most_skips)"
            raise UserError(f"{what} {row}, so training stopped there. {ADVICE}")
        log.log(self.level, "%s It is left out; so far there were %d such steps.", what, self.skipped)

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


ADVICE = (
    "If the samples are sound, try a smaller optimizer.lr or trainer.gradient_clip_val=1; the same command goes on "
    "from the last checkpoint, if there is one."
)
SKIP = "With guard.on_nonfinite=skip such steps are left out and counted."


def tell_step(step: int, what: str, samples: list[Sample]) -> str:
    """Name the samples whose error is not finite; all of the step if none is by itself."""
    bad = [sample for sample in samples if not math.isfinite(sample.error)]
    value = f"{bad[0].error}" if bad and what == "loss" else "not finite"
    whose = "The samples that made it so" if bad else "No sample is by itself; those of the step"
    named = bad or samples
    shards = ", ".join(sorted({sample.shard for sample in named}))
    keys = ", ".join(sample.key for sample in named[:MOST_KEYS])
    more = f" and {len(named) - MOST_KEYS} more" if len(named) > MOST_KEYS else ""
    return f"the {what} of step {step} is {value}. {whose}: shards {shards}; keys {keys}{more}."


def gradient_norm(optimizer: Optimizer, device: torch.device) -> Tensor:
    """Of this rank's parts. In float32 whatever the gradients are: fp16 would hold no norm above 65504."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = local(parameter.grad for parameter in parameters if parameter.grad is not None)
    if not gradients:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))


def gate(optimizer: Any, left_out: Tensor) -> None:
    """Let the optimizer's next step do nothing where ``left_out`` is 1."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = left_out
    elif bool(left_out):  # waits for the device
        optimizer.zero_grad(set_to_none=True)


class FrozenGuard(L.Callback):
    """Raises RuntimeError when frozen weights change during training.

    They are hashed before and after. Before a checkpoint is written the sums of their bits, made where they are, are
    compared: any one change is seen, and it costs no more than to read them once.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.before = pl_module.model.frozen_hash()
        self.sums = sums_of_bits(pl_module.model)

    def settle(self, trainer: L.Trainer, pl_module: Any) -> None:
        if sums_of_bits(pl_module.model) != self.sums:
            raise RuntimeError(f"the frozen weights changed before step {trainer.global_step}; {DISTRUST}")

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.model.frozen_hash() != self.before:
            raise RuntimeError(f"the frozen weights changed during training; {DISTRUST}")


DISTRUST = "what was trained with them, the adapter file too, is not to be trusted"


@torch.no_grad()
def sums_of_bits(model: Any) -> list[int]:
    """Of every frozen weight and buffer (this rank's part), taken as integers modulo 2⁶⁴."""
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in local(frozen_tensors(model)):
        sums.setdefault(tensor.device, []).append(sum_of_bits(tensor))
    return [number for each in sums.values() for number in torch.stack(each).tolist()]


def sum_of_bits(tensor: Tensor) -> Tensor:
    """By eight bytes, which torch adds up ten times as fast as it does narrower integers; the rest by one."""
    octets = tensor.contiguous().reshape(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        return octets.sum()
    split = len(octets) // 8 * 8
    return octets[:split].view(torch.int64).sum() + octets[split:].sum()


def frozen_tensors(model: Any) -> Iterator[Tensor]:
    parts: list[nn.Module] = [model.family, model.encoder]
    for part in parts:
        yield from part.parameters()
        yield from part.buffers()
