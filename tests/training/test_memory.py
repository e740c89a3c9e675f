"""The estimated memory of a step on a transformer is what torch's CPU allocator hands out, quantized or not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import tiny
import tiny_flow
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ipa.families.hollow import quantize_hollow
from ipa.model import IPAdapterModel
from ipa.training.memory import estimate_peak, make_batch
from ipa.types import Batch

BATCH = 16


class Step:
    def __init__(self, model: IPAdapterModel) -> None:
        self.model = model
        model.checkpoint_gradients()
        model.adapter.install()
        self.optimizer = torch.optim.AdamW(model.trained(), lr=1e-4)

    def __call__(self, batch: Batch) -> None:
        self.model.errors(batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def stored(tensor: Tensor) -> list[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def standing(step: Step, batch: Batch) -> int:
    """Bytes allocated before a step: weights, optimizer state, batch."""
    tensors: list[Tensor] = [*step.model.parameters(), *step.model.buffers()]
    tensors += [value for state in step.optimizer.state.values() for value in state.values()]
    batch.map(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
    storages = [part.untyped_storage() for tensor in tensors for part in stored(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def real_peak(step: Step, batch: Batch) -> int:
    """Of a step, on top of what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(batch)
    events = profiled.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


CASES: list[Any] = [("flux", None), ("flux", "int8"), ("flux", "fp8"), ("chroma", None)]


@pytest.mark.parametrize(("name", "scheme"), [*CASES, pytest.param("sd35_medium", None, marks=pytest.mark.slow)])
def test_estimated_memory_is_what_is_allocated(name: str, scheme: str | None) -> None:
    make: Callable[[], Any] = tiny_flow.MAKERS[name]
    model = tiny_flow.make_model(make)
    if scheme:
        torchao: Any = pytest.importorskip("torchao.quantization")
        configs = {"int8": torchao.Int8WeightOnlyConfig, "fp8": torchao.Float8WeightOnlyConfig}
        torchao.quantize_(model.family.transformer, configs[scheme]())
    step = Step(model)
    batch = make_batch(model, BATCH, tiny.IMAGE_PX, cached=False)
    step(batch)
    with torch.device("meta"):
        hollow = tiny_flow.make_model(make)
    quantize_hollow(hollow.family, scheme)
    estimated = estimate_peak(hollow, Step, BATCH, tiny.IMAGE_PX)

    assert estimated - standing(step, batch) == pytest.approx(real_peak(step, batch), rel=0.08)
