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

from ipa.families.attention_host import AttentionBranch, AttentionHost, BranchProcessor, join_heads, split_heads


class CrossAttentionBranch(AttentionBranch):
    """K′ and V′ of one layer, initialised as copies of the layer's own K and V."""

    def __init__(self, attention: Attention) -> None:
        weight = attention.to_k.weight
        super().__init__(attention.heads, weight.shape[1], weight.shape[0], weight.device)
        with torch.no_grad():
            self.to_k_ip.weight.copy_(attention.to_k.weight)
            self.to_v_ip.weight.copy_(attention.to_v.weight)


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
    """The layer's own cross-attention, without its output projection."""
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, text_BLD.shape[1], len(text_BLD))
        mask = mask.view(len(text_BLD), attn.heads, -1, mask.shape[-1])
    key_BMLd = split_heads(attn.to_k(text_BLD), attn.heads)
    value_BMLd = split_heads(attn.to_v(text_BLD), attn.heads)
    return join_heads(F.scaled_dot_product_attention(query_BMQd, key_BMLd, value_BMLd, attn_mask=mask))


def blocks_of(unet: nn.Module) -> list[str]:
    """The transformer stacks in the UNet's order: down, mid, up."""
    names = dict.fromkeys(host.block for host in find_hosts(unet))
    return sorted(names, key=lambda name: ("down", "mid", "up").index(name.partition("_")[0]))


def find_hosts(unet: nn.Module) -> list[CrossAttentionHost]:
    """All cross-attention layers in the order of the modules: down, up, mid, which is the published order."""
    hosts = []
    for name, module in unet.named_modules():
        if isinstance(module, BasicTransformerBlock) and module.attn2 is not None:
            hosts.append(CrossAttentionHost(f"{name}.attn2", module.attn2))
    return hosts
