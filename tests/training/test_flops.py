"""The FLOPs of a step: counted without computing, as torch counts them when it computes, and nothing is touched."""

from __future__ import annotations

import sys

import pytest
import tiny
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ipa.model import IPAdapterModel
from ipa.training.flops import count_flops, peak_flops, without_fast_attention

sys.path.append(str(ROOT / "benchmarks"))

import models

TFLOP = 1e12


def installed(**options: str) -> IPAdapterModel:
    model = tiny.shake(tiny.make_model(**options))
    model.adapter.install()
    return model


@pytest.mark.parametrize(
    ("head", "kind"), [("global", "decoupled"), pytest.param("fine_grained", "simple", marks=pytest.mark.slow)]
)
def test_as_many_as_a_step_that_is_computed_and_nothing_is_left_behind(head: str, kind: str) -> None:
    model, batch = installed(head=head, kind=kind), tiny.make_batch()
    before = torch.get_rng_state()
    counted = count_flops(model, batch)

    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert type(getattr(model.no_image(2), "pooled_BE" if head == "global" else "patches_BPF")) is torch.Tensor
    with FlopCounterMode(display=False) as counter, without_fast_attention():
        model.errors(batch).loss.backward()
    assert counted == counter.get_total_flops() > 0
    assert peak_flops(torch.device("cpu"), "bf16-mixed") is None  # the peak of no known card is not made up


@pytest.mark.slow
def test_what_is_computed_again_does_not_count() -> None:
    plain, again = installed(), installed()
    again.checkpoint_gradients()

    assert count_flops(plain, tiny.make_batch()) == count_flops(again, tiny.make_batch())
    assert again.recomputes
    with FlopCounterMode(display=False) as counter, without_fast_attention():
        again.errors(tiny.make_batch()).loss.backward()
    assert counter.get_total_flops() > (count_flops(plain, tiny.make_batch()) or 0)


@pytest.mark.slow
def test_stable_diffusion_at_full_size_needs_what_was_counted_for_it() -> None:
    """A sample's UNet forward and backward, base frozen, 1.669 TFLOP; VAE 1.117, ViT-H/14 0.335, CLIP-L 0.013."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = models.make_hollow("sd15", fake)
    model.adapter.install()
    with fake:
        online, cached = (count_flops(model, models.make_batch(model, 1, 512, cached)) for cached in (False, True))

    assert online is not None and cached is not None
    assert cached / TFLOP == pytest.approx(1.669 + 0.013, rel=0.03)
    assert (online - cached) / TFLOP == pytest.approx(1.117 + 0.335, rel=0.03)
