"""An exponential moving average (EMA) of the trainable set, torch's ``AveragedModel`` over its parameters alone.

    θ̄ ← d θ̄ + (1 − d) θ,     d = min(decay, (1 + n) / (10 + n)) after n steps

from θ̄ = θ after the first step, so that an average with a long horizon does not hang on to the start of a short run
(Polyak & Juditsky 1992; the warm-up as in TensorFlow's ExponentialMovingAverage).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ipa.training.strategies import like, local

COUNT = "count"

Tensors = list[Tensor] | tuple[Tensor, ...]


class WeightAverage:
    """The average of ``module``'s parameters; it starts as they are."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        check_decay(decay)
        self.decay = decay
        self.names = [name for name, _ in module.named_parameters()]
        # a list and not the module: a copy of an adapter would copy the whole base, which its hosts belong to
        self.watched = nn.ParameterList(module.parameters())
        self.averaged = AveragedModel(self.watched, multi_avg_fn=self.move)
        self.kept: Tensor | float = 1.0  # 0 while a step that was left out goes by

    @torch.no_grad()
    def move(self, averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        averaged, current = local(averaged), local(current)
        weight = 1 - torch.clamp(torch.as_tensor((1 + count) / (10 + count)), max=self.decay)
        weight = weight * self.kept
        steps: Any = torch._foreach_sub(current, averaged)
        torch._foreach_mul_(steps, weight.to(averaged[0]))
        torch._foreach_add_(averaged, steps)

    def update(self, left_out: Tensor | None = None) -> None:
        """Take in the weights of one more step; where ``left_out`` is 1, on the device, nothing changes."""
        self.kept = 1.0 if left_out is None else 1 - left_out
        self.averaged.to(self.watched[0].device).update_parameters(self.watched)
        if left_out is not None:
            self.averaged.n_averaged -= left_out.long()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While inside, the module has the averaged weights."""
        if not self.averaged.n_averaged:
            yield
            return
        current = [parameter.detach().clone() for parameter in self.watched]
        self.put(list(self.averaged.module.parameters()))
        try:
            yield
        finally:
            self.put(current)

    @torch.no_grad()
    def put(self, weights: list[Tensor]) -> None:
        for parameter, value in zip(self.watched, weights, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the module's own names, shared out as it is, and how many steps they took in."""
        weights = dict(zip(self.names, self.averaged.module.parameters(), strict=True))
        return {name: weight.detach() for name, weight in weights.items()} | {COUNT: self.averaged.n_averaged}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, parameter in zip(self.names, self.averaged.module.parameters(), strict=True):
            parameter.copy_(like(state[name], parameter))
        self.averaged.n_averaged.copy_(state[COUNT])


def check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"ema.decay={decay}: at least 0 and below 1, for example 0.9999")
