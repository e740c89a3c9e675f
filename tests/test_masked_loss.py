"""The masked loss against the plain one and against a step written out."""

from dataclasses import replace

import pytest
import tiny
import torch
from test_model import gradients
from torch import Tensor

from ipa.model import IPAdapterModel
from ipa.objective import MaskedLoss
from ipa.types import Batch

CELLS = tiny.IMAGE_PX // 2


def installed(masked_loss: MaskedLoss, double: bool = False) -> IPAdapterModel:
    model = tiny.shake(tiny.make_model())
    model.adapter.install()
    model.masked_loss = masked_loss
    return model.double() if double else model


def half_mask() -> Tensor:
    """uint8 mask_B1HW of make_batch: the left half is inside, with a soft border."""
    mask = torch.zeros(3, 1, CELLS, CELLS, dtype=torch.uint8)
    mask[..., : CELLS // 2] = 255
    mask[..., CELLS // 2] = 100
    return mask


def with_mask(mask: Tensor) -> Batch:
    return replace(tiny.make_batch(), loss_mask_B1HW=mask)


@pytest.mark.parametrize("masked_loss", [MaskedLoss(), MaskedLoss(0.3), MaskedLoss(prior=1.0)])
def test_a_mask_of_ones_gives_the_plain_gradient_to_the_bit(masked_loss: MaskedLoss) -> None:
    model = installed(masked_loss)
    plain = gradients(model.errors(tiny.make_batch()).loss, model)
    whole = gradients(model.errors(with_mask(torch.full_like(half_mask(), 255))).loss, model)

    assert all(torch.equal(whole[name], plain[name]) for name in plain)


@pytest.mark.parametrize("prior", [0.0, 0.7])
@pytest.mark.parametrize("outside", [0.0, 0.2])
def test_the_step_is_that_written_out(outside: float, prior: float) -> None:
    model, batch = installed(MaskedLoss(outside, prior), double=True), with_mask(half_mask())
    draws, text = batch.draws, model.family.encode_text(batch.text)
    x0 = model.posterior_of(batch).sample(draws.posterior_noise_BCHW)
    corrupted = model.family.corrupt(x0, draws.noise_BCHW, draws.time_B)
    tokens = model.image_tokens(model.encode_reference(batch.reference_B3HW))
    prediction = model.predict(corrupted.noisy, corrupted.time_B, text, tokens, 1.0)
    base = model.family.denoise(corrupted.noisy, corrupted.time_B, text)
    inside = half_mask().double() / 255
    error = (inside + outside * (1 - inside)) * (prediction - draws.noise_BCHW) ** 2
    expected = (error + prior * (1 - inside) * (prediction - base) ** 2).mean()
    loss = model.errors(batch).loss

    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=0)
    found, wanted = gradients(loss, model), gradients(expected, model)
    for name in wanted:
        assert (found[name] - wanted[name]).norm() < 1e-6 * wanted[name].norm(), name
