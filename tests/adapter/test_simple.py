"""The simple adapter: the frozen base with the image tokens, times λ, behind the text, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_sdxl
import torch
from torch import Tensor

from ipa.errors import UserError
from ipa.model import IPAdapterModel
from ipa.types import TextCondition

pytestmark = pytest.mark.usefixtures("no_grad")


def make_simple(family: str = "sd15", head: str = "global") -> IPAdapterModel:
    model = tiny.shake(tiny.make_model(head=head, kind="simple", family=tiny_sdxl.FAMILIES[family]()))
    model.adapter.install()
    return model


def denoise_by_hand(model: IPAdapterModel, latents: Tensor, t_B: Tensor, text: TextCondition, *more: Tensor) -> Tensor:
    """The UNet's own call with whatever follows the text's states."""
    added = None if text.pooled_BE is None else {"text_embeds": text.pooled_BE, "time_ids": text.size_B6}
    states = torch.cat([text.states_BLD, *more], dim=1)
    return model.family.unet(latents, t_B, states, added_cond_kwargs=added).sample


@pytest.mark.parametrize(
    ("family", "head", "scale"),
    [
        ("sd15", "global", 1.0),
        ("sd15", "full", 0.3),
        ("sd21", "fine_grained", 0.3),
        ("sdxl", "global", torch.tensor([0.7, 1.5]).view(2, 1, 1)),
    ],
)
def test_the_tokens_times_scale_follow_the_text(family: str, head: str, scale: Any) -> None:
    model = make_simple(family, head)
    latents, t_B, text, tokens = tiny.make_inputs(model)
    prediction = model.predict(latents, t_B, text, tokens, scale)

    assert torch.equal(prediction, denoise_by_hand(model, latents, t_B, text, scale * tokens))
    assert (prediction - denoise_by_hand(model, latents, t_B, text)).abs().max() > 0.01


@pytest.mark.parametrize("family", tiny_sdxl.FAMILIES)
def test_the_base_is_never_touched_and_scale_zero_cannot_be_a_part_of_the_batch(family: str) -> None:
    model = make_simple(family)
    before, hashed = model.family.unet.attn_processors, model.frozen_hash()
    latents, t_B, text, tokens = tiny.make_inputs(model)
    frozen, whole = denoise_by_hand(model, latents, t_B, text), model.predict(latents, t_B, text, tokens, 1.0)

    assert torch.equal(model.predict(latents, t_B, text, None, 1.0), frozen)
    for scale in (0.0, 0, torch.zeros(2, 1, 1)):
        assert torch.equal(model.predict(latents, t_B, text, tokens, scale), frozen)
    # the output jumps at zero
    nearly = model.predict(latents, t_B, text, tokens, 1e-6)
    assert (nearly - frozen).abs().max() > 0.01
    zeroed = denoise_by_hand(model, latents, t_B, text, torch.zeros_like(tokens))
    torch.testing.assert_close(nearly, zeroed, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="scale cannot be 0 for a part of a batch"):
        model.predict(latents, t_B, text, tokens, torch.tensor([0.0, 1.0]).view(2, 1, 1))

    model.adapter.remove()
    assert all(model.family.unet.attn_processors[name] is processor for name, processor in before.items())
    assert model.frozen_hash() == hashed and torch.equal(model.predict(latents, t_B, text, tokens, 1.0), whole)


def test_the_text_keeps_its_rest_and_its_precision() -> None:
    model = make_simple("sdxl")
    text = model.family.encode_text(["cat", "a red dog"], torch.tensor([[300, 451, 7, 0, 16, 16]] * 2))
    states = text.states_BLD.clone()
    tokens = torch.randn(2, 4, tiny_sdxl.CONTEXT_WIDTH)
    with model.prompted(text, tokens, 0.5) as given:
        assert given.pooled_BE is text.pooled_BE and given.size_B6 is text.size_B6

    assert torch.equal(given.states_BLD, torch.cat([states, 0.5 * tokens], dim=1))
    assert torch.equal(text.states_BLD, states)
    half = replace(text, states_BLD=states.bfloat16())
    with model.prompted(half, tokens, 0.5) as given:
        assert given.states_BLD.dtype == torch.bfloat16
    with model.prompted(text, None, 0.5) as given:
        assert given is text
