"""A cross-attention layer of a diffusers UNet as a host for an image branch.

Decoupled cross-attention (Ye et al. 2023, equation 5), with one query for both and the sum taken before ``to_out``:

    Z = softmax(Q Kᵀ / √d) V + λ · softmax(Q K′ᵀ / √d) V′,     K′ = c_i W′_k,  V′ = c_i W′_v

Letters here: those of `ipa.families.attention_host`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ipa.families.attention_host import (
    AttentionHost,
    BranchProcessor,
    Once,
    every_time,
    join_heads,
    split_heads,
)

REFERENCE_WIDTH = 1280  # of the layers for which "C penalty" leaves λ as it is


def scale_keys_and_values(key_BMTd: Tensor, value_BMTd: Tensor, scale: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """λ inside the softmax, as in ComfyUI_IPAdapter_plus (`ipa.presets.SCALINGS`); C is the layer's width.

    K+V                            Attention(Q, λ K′, λ V′)
    K+V w/ C penalty               the same with w = λ C / 1280
    K+mean(V) w/ C penalty         Attention(Q, w K′, V′ − V̄′ + w V̄′), V̄′ the mean over the tokens
    """
    width = key_BMTd.shape[1] * key_BMTd.shape[3]
    weight = scale.to(key_BMTd) * (width / REFERENCE_WIDTH if "penalty" in how else 1.0)
    weight = weight[..., None] if weight.ndim else weight
    if how.startswith("K+V"):
        return weight * key_BMTd, weight * value_BMTd
    mean = value_BMTd.mean(2, keepdim=True)
    return weight * key_BMTd, value_BMTd - mean + weight * mean


class CrossAttentionBranch(nn.Module):
    """K′ and V′ of one layer, initialised as copies of the layer's own K and V."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        inner_width, context_width = attention.to_k.weight.shape
        self.heads = attention.heads
        factory = {"device": attention.to_k.weight.device, "dtype": torch.float32}
        self.to_k_ip = nn.Linear(context_width, inner_width, bias=False, **factory)
        self.to_v_ip = nn.Linear(context_width, inner_width, bias=False, **factory)
        with torch.no_grad():
            self.to_k_ip.weight.copy_(attention.to_k.weight)
            self.to_v_ip.weight.copy_(attention.to_v.weight)

    def forward(
        self,
        query_BMQd: Tensor,
        tokens_BTD: Tensor,
        time: Tensor | None,
        scale: Tensor,
        once: Once = every_time,
        scaling: str = "V only",
        present_BT: Tensor | None = None,
    ) -> Tensor:
        """Return λ · Attention(Q, K′, V′) as B × Q × (M d). The time embedding is not used by this family.

        Tokens that are not present have logits of −∞.
        """
        dtype = query_BMQd.dtype
        key_BMTd, value_BMTd = once((self, dtype), lambda: self.project(tokens_BTD, dtype))
        if scaling != "V only":
            key_BMTd, value_BMTd = scale_keys_and_values(key_BMTd, value_BMTd, scale, scaling)
            scale = (scale != 0).to(scale)  # λ = 0 is exactly nothing
        mask_B11T = None if present_BT is None else present_BT[:, None, None]
        attended = F.scaled_dot_product_attention(query_BMQd, key_BMTd, value_BMTd, attn_mask=mask_B11T)
        return scale.to(attended.dtype) * join_heads(attended)

    def project(self, tokens_BTD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K′ and V′, both B × M × T × d."""
        key, value = self.to_k_ip(tokens_BTD), self.to_v_ip(tokens_BTD)
        return split_heads(key, self.heads).to(dtype), split_heads(value, self.heads).to(dtype)


class CrossAttentionProcessor(BranchProcessor):
    """Adds the branches to the text's attention before the output projection."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        prompts = self.acting()
        if not prompts:
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **unused)
        assert encoder_hidden_states is not None, "a cross-attention layer was called without text"
        query_BMQd = split_heads(attn.to_q(hidden_states), attn.heads)
        attended = text = attend_to_text(attn, query_BMQd, encoder_hidden_states, attention_mask)
        for branch, prompt in prompts:
            scale, how = prompt.scale_at(self.host), {"scaling": prompt.scaling, "present_BT": prompt.present_BT}
            image = branch(query_BMQd, prompt.tokens_BTD, temb, scale, prompt.once, **how)
            attended = attended + self.added(prompt, text, image)
        out = attn.to_out[1](attn.to_out[0](attended))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class CrossAttentionHost(AttentionHost):
    """The cross-attention of one transformer block, in SD 1.x, 2.x and SDXL."""

    processor_class = CrossAttentionProcessor

    def __init__(self, name: str, attention: Attention) -> None:
        super().__init__(name, attention, name.partition(".transformer_blocks.")[0])

    def make_branch(self) -> CrossAttentionBranch:
        return CrossAttentionBranch(self.attention)


def attend_to_text(attn: Attention, query_BMQd: Tensor, text_BLD: Tensor, mask: Tensor | None) -> Tensor:
    """The layer's own cross-attention up to, not including, its output projection."""
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, text_BLD.shape[1], len(text_BLD))
        mask = mask.view(len(text_BLD), attn.heads, -1, mask.shape[-1])
    key_BMLd = split_heads(attn.to_k(text_BLD), attn.heads)
    value_BMLd = split_heads(attn.to_v(text_BLD), attn.heads)
    return join_heads(F.scaled_dot_product_attention(query_BMQd, key_BMLd, value_BMLd, attn_mask=mask))


def blocks_of(unet: nn.Module) -> list[str]:
    """The transformer stacks in the order in which they run: down, mid, up."""
    names = dict.fromkeys(host.block for host in find_hosts(unet))
    return sorted(names, key=lambda name: ("down", "mid", "up").index(name.partition("_")[0]))


def find_hosts(unet: nn.Module) -> list[CrossAttentionHost]:
    """All cross-attention layers in the order of the modules: down, up, mid, which is the published order."""
    hosts = []
    for name, module in unet.named_modules():
        if isinstance(module, BasicTransformerBlock) and module.attn2 is not None:
            hosts.append(CrossAttentionHost(f"{name}.attn2", module.attn2))
    return hosts
