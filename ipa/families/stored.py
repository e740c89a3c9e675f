"""Quantized layers for memory estimates: the size of what they store and of the weights they compute with.

They replace the layers of torchao, bitsandbytes and GGUF (`ipa.families.quantization`) in bases without weights, so
that memory can be estimated without those packages. With torchao and GGUF, torch keeps the dequantized weights until
the backward pass, so quantization lowers the peak only with gradient checkpointing; bitsandbytes recomputes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = {"fp8": 8.0, "int8": 8.0, "nf4": 4.5}  # of a weight, its share of the scales included


class StoredLinear(nn.Module):
    """Its ``weight`` has a shape and a dtype, but no memory."""

    stored: Tensor

    def __init__(self, linear: nn.Linear, bits: float, remade: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.remade = linear.in_features, linear.out_features, remade
        size, device = round(linear.weight.numel() * bits / 8), linear.weight.device
        self.register_buffer("stored", torch.empty(size, dtype=torch.uint8, device=device))
        self.bias = linear.bias
        self.weight = linear.weight.data.to("meta")

    def forward(self, states: Tensor) -> Tensor:
        if self.remade:
            out: Tensor = RemadeLinear.apply(states, self.stored, self.weight)
            return out if self.bias is None else out + self.bias
        return F.linear(states, make_weight(self.stored, self.weight), self.bias)


class RemadeLinear(torch.autograd.Function):
    """As bitsandbytes' MatMul4Bit: keeps no weights for the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, stored: Tensor, like: Tensor) -> Tensor:
        ctx.save_for_backward(stored)
        ctx.like = like
        weight = make_weight(stored, like)
        return F.linear(states.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (stored,), (gradient,) = ctx.saved_tensors, gradients
        return gradient @ make_weight(stored, ctx.like).to(gradient.dtype), None, None


def make_weight(stored: Tensor, like: Tensor) -> Tensor:
    return stored.new_empty(like.shape, dtype=like.dtype)


def store(module: nn.Module, bits: float, remade: bool = False, kept: Sequence[str] = ()) -> None:
    """Replace the linear layers of ``module`` in place, except those whose names contain one of ``kept``."""
    linears = {name: each for name, each in module.named_modules() if type(each) is nn.Linear}
    for name, linear in linears.items():
        if not any(part in name for part in kept):
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, StoredLinear(linear, bits, remade))
