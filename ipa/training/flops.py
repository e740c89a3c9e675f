"""Floating point operations that a training step needs, counted without computing them, and the share of the peak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from ipa.model import IPAdapterModel
from ipa.types import Batch

HALVES = {"bf16": torch.bfloat16, "16": torch.float16}  # how Lightning's names of precisions begin


def count_flops(model: IPAdapterModel, batch: Batch) -> int | None:
    """FLOPs (two per multiply-add) of the forward and backward passes of one step on ``batch``.

    What is needed is counted: gradients of the adapter's weights and of what leads to them, and nothing twice, although
    gradient checkpointing computes it twice. Shapes are followed through fake tensors, so this takes neither the
    device's time nor its memory. The adapter must be installed. None where weights are shared out (FSDP), since they
    are put together only as they are used.
    """
    weights = [weight for weight in model.trainable.parameters() if weight.requires_grad]
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        return None
    model.no_image(1)  # which the model keeps, so it must not be a fake one
    with model.eagerly(), without_recomputation(model), without_fast_attention():
        fake = detect_fake_mode(weights) or FakeTensorMode(allow_non_fake_inputs=True)
        counter = FlopCounterMode(display=False)
        with fake, counter:
            torch.autograd.grad(model.errors(batch).loss, weights)
    return counter.get_total_flops()


@contextmanager
def without_recomputation(model: IPAdapterModel) -> Iterator[None]:
    before, model.recomputes = model.recomputes, False
    try:
        yield
    finally:
        model.recomputes = before


@contextmanager
def without_fast_attention() -> Iterator[None]:
    """torch's counter knows nothing of the one kernel into which nn.MultiheadAttention puts its layers in inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What the card could do in a second at best, dense, in Lightning's ``precision``; None for an unknown one."""
    kinds = [kind for name, kind in HALVES.items() if precision.startswith(name)]
    return get_available_flops(device, kinds[0] if kinds else torch.float32)
