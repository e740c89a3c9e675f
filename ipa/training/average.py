"""An exponential moving average (EMA) of the trainable set.

    θ̄ ← d θ̄ + (1 − d) θ,     d = min(decay, (1 + n) / (10 + n)) after n steps

from θ̄ = θ after the first step, so that an average with a long horizon does not hang on to the start of a short run
(Polyak & Juditsky 1992; the warm-up as in TensorFlow's ExponentialMovingAverage).

torch's ``AveragedModel`` asks its count in every step whether it is the first, for which a GPU would be waited for, and
Lightning's ``WeightAveraging`` copies the frozen parts, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ipa.errors import UserError
from ipa.training.strategies import like, local

COUNT = "count"


class WeightAverage:
    """The average of ``module``'s parameters; it starts as they are, and its count lies where they lie."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        check_decay(decay)
        self.decay = decay
        self.names = [name for name, _ in module.named_parameters()]
        self.watched = list(module.parameters())
        self.averaged = [parameter.detach().clone() for parameter in self.watched]
        self.count = torch.zeros((), dtype=torch.long)

    @torch.no_grad()
    def update(self, left_out: Tensor | None = None) -> None:
        """Take in the weights of one more step; where ``left_out`` is 1, on the device, nothing changes."""
        device = self.watched[0].device
        self.averaged = [average.to(device) for average in self.averaged]  # Lightning has moved the weights since
        self.count = self.count.to(device)
        decay = torch.clamp((1 + self.count) / (10 + self.count), max=self.decay)
        taken_in = torch.ones((), device=device) if left_out is None else 1 - left_out
        weight = torch.where(self.count == 0, 1.0, 1 - decay) * taken_in
        averaged = local(self.averaged)
        steps = torch._foreach_sub(local(self.watched), averaged)
        torch._foreach_mul_(steps, weight.to(averaged[0]))
        torch._foreach_add_(averaged, steps)
        self.count += taken_in.long()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While inside, the module has the averaged weights."""
        if not self.count:
            yield
            return
        current = [parameter.detach().clone() for parameter in self.watched]
        self.put(self.averaged)
        try:
            yield
        finally:
            self.put(current)

    @torch.no_grad()
    def put(self, weights: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.watched, weights, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the module's own names, shared out as it is, and how many steps they took in."""
        return dict(zip(self.names, self.averaged, strict=True)) | {COUNT: self.count}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in zip(self.names, self.averaged, strict=True):
            average.copy_(like(state[name], average))
        self.count.copy_(state[COUNT])


def check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise UserError(f"ema.decay={decay}: at least 0 and below 1, for example 0.9999")
