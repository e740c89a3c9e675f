"""An adapter can be put in and taken out, and where it has nothing to say it changes nothing, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_sdxl
import torch
from torch import Tensor

from ipa.adapter.kinds import DecoupledAdapter
from ipa.model import IPAdapterModel
from ipa.types import ImagePrompt, TextCondition

pytestmark = pytest.mark.usefixtures("no_grad")


def processors(model: IPAdapterModel) -> dict[str, Any]:
    return dict(model.family.unet.attn_processors)


def same_objects(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


@pytest.fixture
def inputs(model: IPAdapterModel) -> tuple[Tensor, Tensor, TextCondition, Tensor]:
    return tiny.make_inputs(model)


@pytest.mark.parametrize(
    ("family", "head", "dtype"),
    [
        *((family, "global", torch.float32) for family in tiny_sdxl.FAMILIES),
        *(("sd15", "global", torch.bfloat16), ("sd15", "full", torch.float32), ("sdxl", "fine_grained", torch.float32)),
    ],
)
def test_every_head_on_every_family_can_be_silenced_and_taken_out(family: str, head: str, dtype: torch.dtype) -> None:
    model = tiny.shake(tiny.make_model(head=head, family=tiny_sdxl.FAMILIES[family]()))
    model.family.to(dtype)
    inputs, before, hashed = tiny.make_inputs(model), processors(model), model.frozen_hash()
    latents, t_B, text, _ = inputs
    added = {"text_embeds": text.pooled_BE, "time_ids": text.size_B6}
    frozen = model.family.unet(latents.to(dtype), t_B, text.states_BLD, added_cond_kwargs=added).sample
    model.adapter.install()
    installed = model.predict(*inputs, scale=1.0)
    assert torch.equal(model.predict(*inputs, scale=0.0), frozen) and (installed - frozen).abs().max() > 0.01
    assert torch.equal(model.predict(*inputs[:3], None, scale=1.0), frozen)  # without a prompt
    replaced = {name for name, processor in processors(model).items() if processor is not before[name]}
    assert replaced == {name for name in before if name.endswith("attn2.processor")}

    model.adapter.remove()
    assert same_objects(processors(model), before) and model.frozen_hash() == hashed
    assert torch.equal(model.predict(*inputs, scale=1.0), frozen)
    model.adapter.install()
    assert torch.equal(model.predict(*inputs, scale=1.0), installed)


@pytest.mark.parametrize("head", ["global", "fine_grained"])
@pytest.mark.parametrize("kind", ["decoupled", "simple"])
def test_several_images_are_heard_as_one_whatever_their_order(kind: str, head: str) -> None:
    model = tiny.shake(tiny.make_model(kind=kind, head=head))
    model.adapter.install()
    latents, t_B, text, _ = tiny.make_inputs(model)
    one, other = (model.encode_reference(tiny.make_pictures(2, tiny.REFERENCE_PX, seed)) for seed in (0, 5))
    tokens = model.image_tokens(one, other)
    both = model.predict(latents, t_B, text, tokens, 1.0)
    alone = [model.predict(latents, t_B, text, model.image_tokens(image), 1.0) for image in (one, other)]

    assert torch.equal(tokens, torch.cat([model.head(one), model.head(other)], dim=1))
    swapped = model.predict(latents, t_B, text, model.image_tokens(other, one), 1.0)
    torch.testing.assert_close(swapped, both, rtol=0, atol=1e-4)
    assert all((prediction - both).abs().max() > 0.01 for prediction in alone)


def test_scale_zero_is_the_frozen_base_also_where_the_text_is_masked(model: IPAdapterModel, inputs) -> None:
    latents, t_B, text, tokens = inputs
    mask = torch.arange(tiny.TEXT_LENGTH) < torch.tensor([[4], [7]])
    call = {"sample": latents, "timestep": t_B, "encoder_hidden_states": text.states_BLD}
    call |= {"encoder_attention_mask": mask}
    frozen = model.family.unet(**call).sample
    model.adapter.install()
    with model.prompted(text, tokens, 0.0):
        masked = model.family.unet(**call).sample

    assert torch.equal(masked, frozen)
    assert not torch.equal(masked, model.family.unet(latents, t_B, text.states_BLD).sample)


def test_being_made_or_installed_twice_changes_nothing(model: IPAdapterModel, inputs) -> None:
    before, hashed, frozen = processors(model), model.frozen_hash(), model.predict(*inputs, scale=1.0)
    DecoupledAdapter(model.family.hosts())
    assert same_objects(processors(model), before) and model.frozen_hash() == hashed
    assert not any("branch" in name for name in model.family.state_dict())
    assert torch.equal(model.predict(*inputs, scale=1.0), frozen)
    model.adapter.install()
    there, installed = processors(model), model.predict(*inputs, scale=1.0)
    with pytest.raises(RuntimeError, match=r"down_blocks\.0.*attn2 already has this adapter's branch"):
        model.adapter.install()
    assert same_objects(processors(model), there)
    assert torch.equal(model.predict(*inputs, scale=1.0), installed)


def test_removing_what_is_not_installed_changes_nothing(model: IPAdapterModel) -> None:
    before, other = processors(model), DecoupledAdapter(model.family.hosts())
    model.adapter.remove()
    assert same_objects(processors(model), before)

    model.adapter.install().remove()
    installed = processors(model) if other.install() else {}
    model.adapter.remove()
    assert same_objects(processors(model), installed)


def test_two_adapters_add_up_and_come_out_apart(model: IPAdapterModel, inputs) -> None:
    """Each has a channel of its own; without its prompt it adds nothing."""
    found, plain = processors(model), model.predict(*inputs, scale=0.0)
    other = DecoupledAdapter(model.family.hosts()).install()
    model.adapter.install()
    alone = model.predict(*inputs, scale=1.0)
    with other.channel.carrying(ImagePrompt(inputs[3], torch.tensor(0.5))):
        both, without = model.predict(*inputs, scale=1.0), model.predict(*inputs, scale=0.0)

    assert not torch.equal(alone, plain) and not torch.equal(both, alone) and not torch.equal(without, plain)
    other.remove()
    assert torch.equal(model.predict(*inputs, scale=1.0), alone)
    model.adapter.remove()
    assert same_objects(processors(model), found)


def test_branches_start_as_copies_of_their_layers_keys_and_values_and_every_layer_hears_the_image() -> None:
    model = tiny.make_model()
    layers = [module for name, module in model.family.unet.named_modules() if name.endswith("attn2")]
    assert len(layers) == len(model.adapter.branches) == len(tiny.HIDDEN)
    model.adapter.install()
    inputs = tiny.make_inputs(model)
    whole = model.predict(*inputs, scale=1.0)
    for i, (layer, branch) in enumerate(zip(layers, model.adapter.branches, strict=True)):
        assert torch.equal(branch.to_k_ip.weight, layer.to_k.weight)
        assert torch.equal(branch.to_v_ip.weight, layer.to_v.weight)
        assert branch.heads == layer.heads
        kept = branch.to_v_ip.weight.clone()
        branch.to_v_ip.weight.zero_()
        assert not torch.equal(model.predict(*inputs, scale=1.0), whole), f"layer {i} is deaf"
        branch.to_v_ip.weight.copy_(kept)


def test_a_base_without_cross_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no cross-attention"):
        DecoupledAdapter([])
