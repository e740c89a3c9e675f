"""The branch of one layer against equation 5 written out, and the layer's own path against diffusers' processor."""

import pytest
import tiny
import torch
from diffusers.models.attention_processor import Attention

from ipa.families.attention_host import split_heads
from ipa.families.cross_attention import CrossAttentionBranch, CrossAttentionHost, attend_to_text
from ipa.presets import SCALINGS
from ipa.types import Channel, ImagePrompt


@pytest.fixture
def attention() -> Attention:
    """Two heads, inner width 8, context 16."""
    return tiny.make_unet().get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_branch_starts_as_an_fp32_copy_of_the_layers_own_keys_and_values(
    attention: Attention, dtype: torch.dtype
) -> None:
    branch = CrossAttentionHost("a layer", attention.to(dtype)).make_branch()
    query = torch.randn(1, 2, 5, 4, dtype=dtype)

    for own, copied in ((branch.to_k_ip, attention.to_k), (branch.to_v_ip, attention.to_v)):
        assert torch.equal(own.weight, copied.weight.float())
        assert own.weight.data_ptr() != copied.weight.data_ptr()
    assert not list(branch.buffers()) and len(list(branch.parameters())) == 2
    assert {parameter.dtype for parameter in branch.parameters()} == {torch.float32}
    assert branch(query, torch.randn(1, 4, 16), None, torch.ones(())).dtype == dtype


@pytest.mark.parametrize("scale", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("how", SCALINGS)
def test_a_layer_with_its_branch_is_equation_5_wherever_the_weight_enters(
    attention: Attention, how: str, scale: float
) -> None:
    """And then what the layer does with its output: the residual, and 1 / ``rescale_output_factor``.

    ``attention``'s inner width C is 8, for which the penalty is 8 / 1280.
    """
    host, channel = CrossAttentionHost("a layer", attention.double()), Channel()
    branch = tiny_branch(host).double()
    host.plug(branch, channel)
    shapes = ((2, 9, 8), (2, 5, 16), (2, 4, 16))
    states, text, tokens = (3 * torch.randn(shape, dtype=torch.float64) for shape in shapes)
    query, key, value = attention.to_q(states), branch.to_k_ip(tokens), branch.to_v_ip(tokens)
    weight, mean = scale * 8 / 1280, value.mean(1, keepdim=True)
    key, value = {
        "V only": (key, scale * value),
        "K+V": (scale * key, scale * value),
        "K+V w/ C penalty": (weight * key, weight * value),
        "K+mean(V) w/ C penalty": (weight * key, (value - mean + weight * mean) * (scale > 0)),
    }[how]
    own = tiny.plain_attention(query, attention.to_k(text), attention.to_v(text), heads=2)
    added = tiny.plain_attention(query, key, value, heads=2)
    half = (torch.arange(9) >= 4).double()
    for mask, residual, factor in ((None, False, 1.0), (half.view(1, 3, 3), True, 2.0)):
        attention.residual_connection, attention.rescale_output_factor = residual, factor
        prompt = ImagePrompt(tokens, torch.tensor(scale, dtype=torch.float64), mask_BHW=mask, scaling=how)
        with channel.carrying(prompt), torch.no_grad():
            out, base = attention(states, text), attention.processor.replaced(attention, states, text)

        attended = own + added * (1 if mask is None else half[:, None])
        expected = (attention.to_out[0](attended) + residual * states) / factor
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
        assert scale or torch.equal(out, base)
    torch.testing.assert_close(out[:, :4], base[:, :4])


def tiny_branch(host: CrossAttentionHost) -> CrossAttentionBranch:
    branch = host.make_branch()
    torch.nn.init.normal_(branch.to_k_ip.weight)
    torch.nn.init.normal_(branch.to_v_ip.weight)
    return branch


def test_every_row_can_have_a_scale_of_its_own(attention: Attention) -> None:
    branch = CrossAttentionHost("a layer", attention).make_branch()
    query, tokens = torch.randn(2, 2, 9, 4), torch.randn(2, 4, 16)
    full = branch(query, tokens, None, torch.ones(()))
    out = branch(query, tokens, None, torch.tensor([0.0, 0.5]).view(2, 1, 1))

    assert torch.equal(out, full * torch.tensor([0.0, 0.5]).view(2, 1, 1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layers_own_path_is_that_of_diffusers_bit_for_bit(
    attention: Attention, masked: bool, dtype: torch.dtype
) -> None:
    attention = attention.to(dtype)
    states, text = torch.randn(2, 9, 8, dtype=dtype), torch.randn(2, 5, 16, dtype=dtype)
    mask = (
        torch.tensor([[0, 0, 0, -10000.0, -10000.0], [0, 0, -10000.0, 0, 0]], dtype=dtype)[:, None] if masked else None
    )
    attended = attend_to_text(attention, split_heads(attention.to_q(states), 2), text, mask)

    assert torch.equal(attention.to_out[0](attended), attention(states, text, attention_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_of_a_prompt_changes_no_bit(attention: Attention, dtype: torch.dtype) -> None:
    host, channel = CrossAttentionHost("a layer", attention.to(dtype)), Channel()
    host.plug(host.make_branch(), channel)
    states, text = torch.randn(3, 2, 9, 8, dtype=dtype), torch.randn(2, 5, 16, dtype=dtype)
    tokens, scale = torch.randn(2, 4, 16), torch.tensor(0.7)
    with torch.no_grad(), channel.carrying(ImagePrompt(tokens, scale)):
        kept = [attention(each, text) for each in states]
    with torch.no_grad():
        for each, out in zip(states, kept, strict=True):
            with channel.carrying(ImagePrompt(tokens, scale)):
                assert torch.equal(attention(each, text), out)


def test_a_prompt_that_gradients_are_recorded_of_is_read_anew(attention: Attention) -> None:
    host, channel = CrossAttentionHost("a layer", attention), Channel()
    branch = host.make_branch()
    host.plug(branch, channel)
    states, text = torch.randn(2, 9, 8), torch.randn(2, 5, 16)
    tokens = torch.randn(2, 4, 16, requires_grad=True)
    with channel.carrying(ImagePrompt(tokens, torch.ones(()))):
        with torch.no_grad():
            before = attention(states, text)
        attention(states, text).sum().backward()
        with torch.no_grad():
            branch.to_v_ip.weight.add_(1)
        changed = attention(states, text)

    assert tokens.grad is not None and tokens.grad.abs().sum() > 0
    assert branch.to_k_ip.weight.grad is not None and branch.to_v_ip.weight.grad is not None
    assert not torch.equal(changed, before)
