"""FLOPs of a training step, counted without computing them, and a card's peak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from ipa.model import IPAdapterModel
from ipa.types import Batch

HALVES = {"bf16": torch.bfloat16, "16": torch.float16}  # prefixes of Lightning's precisions


def count_flops(model: IPAdapterModel, batch: Batch) -> int | None:
    """FLOPs (two per multiply-add) of the forward and backward passes of one step on ``batch``.

    Counts what is needed: gradients of the adapter's weights and of what leads to them, and nothing twice, although
    gradient checkpointing computes it twice. The adapter must be installed. None with sharded weights (FSDP).
    """
    weights = model.trained()
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        return None
    model.no_image(1)  # the model keeps it, so it must be a real tensor
    modes = [weight.fake_mode for weight in weights if isinstance(weight, FakeTensor)]
    with model.eagerly(), without_fast_attention(), ExitStack() as stack:
        stack.callback(setattr, model, "recomputes", model.recomputes)
        model.recomputes = False
        counter = FlopCounterMode(display=False)
        with modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True), counter:
            torch.autograd.grad(model.errors(batch).loss, weights)
    return counter.get_total_flops()


@contextmanager
def without_fast_attention() -> Iterator[None]:
    """torch's counter does not know the fused kernel of nn.MultiheadAttention at inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The card's peak in dense FLOP/s in Lightning's ``precision``; None for an unknown card."""
    kinds = [kind for name, kind in HALVES.items() if precision.startswith(name)]
    return get_available_flops(device, kinds[0] if kinds else torch.float32)
