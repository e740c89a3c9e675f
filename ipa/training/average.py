"""An exponential moving average (EMA) of the trainable set.

    θ̄ ← d θ̄ + (1 − d) θ,     d = min(decay, (1 + n) / (10 + n)) after n steps

starting from θ̄ = θ after the first step (Polyak & Juditsky 1992; warm-up as in TensorFlow's ExponentialMovingAverage).

torch's ``AveragedModel`` synchronises with the GPU in every step to see whether it is the first; Lightning's
``WeightAveraging`` copies the frozen base into every checkpoint. Hence our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ipa.training.strategies import like, local

COUNT = "count"


class Average:
    """Averaged weights of ``module``. This base is for those that an optimizer keeps; see ``WeightAverage``."""

    def __init__(self, module: nn.Module) -> None:
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters = list(module.parameters())

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While inside, the module has the averaged weights; afterwards it has its own again, to the bit."""
        current = [parameter.detach().clone() for parameter in self.parameters]
        self.show()
        try:
            yield
        finally:
            self.hide()
            self.put(current)

    def show(self) -> None:
        """Give the module the averaged weights."""

    def hide(self) -> None:
        """Called before the module gets its own weights again."""

    def update(self, skip: Tensor | None = None) -> None:
        """Take in the weights of one more step; nothing changes where ``skip``, a tensor on the device, is 1."""

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the module's names, sharded as they are, and the number of steps taken in."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a ``state_dict``."""

    @torch.no_grad()
    def put(self, weights: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, weights, strict=True):
            parameter.copy_(value)


class WeightAverage(Average):
    """The average of ``module``'s parameters, on their device."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module)
        self.decay = decay
        self.averaged = [parameter.detach().clone() for parameter in self.parameters]
        self.count = torch.zeros((), dtype=torch.long)

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        device = self.parameters[0].device
        self.averaged = [average.to(device) for average in self.averaged]  # Lightning moves the weights after __init__
        self.count = self.count.to(device)
        decay = torch.clamp((1 + self.count) / (10 + self.count), max=self.decay)
        taken = torch.ones((), device=device) if skip is None else 1 - skip
        weight = torch.where(self.count == 0, 1.0, 1 - decay) * taken
        averaged = local(self.averaged)
        steps = torch._foreach_sub(local(self.parameters), averaged)
        torch._foreach_mul_(steps, weight.to(averaged[0]))
        torch._foreach_add_(averaged, steps)
        self.count += taken.long()

    def show(self) -> None:
        if self.count:
            self.put(self.averaged)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averaged, strict=True)) | {COUNT: self.count}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in zip(self.names, self.averaged, strict=True):
            average.copy_(like(state[name], average))
        self.count.copy_(state[COUNT])
