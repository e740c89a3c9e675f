"""A cross-attention layer of a diffusers UNet as a host for an image branch.

Decoupled cross-attention (Ye et al. 2023, equation 5), with one query for both and the sum taken before ``to_out``:

    Z = softmax(Q Kᵀ / √d) V + λ · softmax(Q K′ᵀ / √d) V′,     K′ = c_i W′_k,  V′ = c_i W′_v

Letters here: Q queries (latent cells), M heads, d head width; the rest as in ``ipa.types``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ipa.types import Channel, ImagePrompt

Once = Callable[[Hashable, Callable[[], Any]], Any]


def every_time(key: Hashable, make: Callable[[], Any]) -> Any:
    """``ImagePrompt.once`` for tokens without a prompt: nothing is kept."""
    return make()


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
        present_BT: Tensor | None = None,
    ) -> Tensor:
        """Return λ · Attention(Q, K′, V′) as B × Q × (M d). The time embedding is not used by this family.

        Tokens that are not present have logits of −∞.
        """
        dtype = query_BMQd.dtype
        key_BMTd, value_BMTd = once((self, dtype), lambda: self.project(tokens_BTD, dtype))
        mask_B11T = None if present_BT is None else present_BT[:, None, None]
        attended = F.scaled_dot_product_attention(query_BMQd, key_BMTd, value_BMTd, attn_mask=mask_B11T)
        return scale.to(attended.dtype) * join_heads(attended)

    def project(self, tokens_BTD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K′ and V′, both B × M × T × d."""
        key, value = self.to_k_ip(tokens_BTD), self.to_v_ip(tokens_BTD)
        return split_heads(key, self.heads).to(dtype), split_heads(value, self.heads).to(dtype)


class CrossAttentionHost:
    """The cross-attention of one transformer block, in SD 1.x, 2.x and SDXL."""

    def __init__(self, name: str, attention: Attention) -> None:
        self.name = name
        self.attention = attention
        self._branch: tuple[nn.Module, Channel] | None = None

    @property
    def width(self) -> int:
        return self.attention.to_k.out_features

    def make_branch(self) -> CrossAttentionBranch:
        return CrossAttentionBranch(self.attention)

    @property
    def block(self) -> str:
        return self.name.partition(".transformer_blocks.")[0]

    def plug(self, branch: nn.Module, channel: Channel) -> None:
        if self._branch is not None:
            raise RuntimeError(f"{self.name} already has this adapter's branch; call remove() first")
        processor: Any = self.attention.processor
        if not isinstance(processor, BranchProcessor):
            processor = BranchProcessor(self.name, processor)
            self.attention.processor = processor
        self._branch = (branch, channel)
        processor.branches.append(self._branch)

    def unplug(self) -> None:
        processor: Any = self.attention.processor
        if self._branch is None:
            return
        processor.branches.remove(self._branch)
        self._branch = None
        if not processor.branches:
            self.attention.processor = processor.replaced


class BranchProcessor:
    """Replaces a layer's processor, with the branch and the channel of each adapter that is plugged in there.

    Without a prompt for this layer it calls the processor that it replaced.
    """

    def __init__(self, host: str, replaced: Any) -> None:
        self.host = host
        self.replaced = replaced
        self.branches: list[tuple[nn.Module, Channel]] = []

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        prompts = [(branch, prompt) for branch, channel in self.branches for prompt in channel.at(self.host)]
        if not prompts:
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **unused)
        assert encoder_hidden_states is not None, "a cross-attention layer was called without text"
        query_BMQd = split_heads(attn.to_q(hidden_states), attn.heads)
        attended = text = attend_to_text(attn, query_BMQd, encoder_hidden_states, attention_mask)
        for branch, prompt in prompts:
            scale = prompt.scale_at(self.host)
            if prompt.mask_BHW is not None:
                scale = scale.to(attended) * mask_of(prompt, len(attended), attended.shape[1]).to(attended)
            image = branch(query_BMQd, prompt.tokens_BTD, temb, scale, prompt.once, prompt.present_BT)
            attended = attended + image
            if prompt.watch is not None:
                prompt.watch(self.host, text, image)
        out = attn.to_out[1](attn.to_out[0](attended))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def mask_of(prompt: ImagePrompt, batch: int, queries: int) -> Tensor:
    """The prompt's mask on a layer's grid, B × Q × 1, resized as diffusers does."""
    mask_BHW = prompt.mask_BHW
    assert mask_BHW is not None
    return prompt.once(
        ("mask", queries), lambda: IPAdapterMaskProcessor.downsample(mask_BHW, batch, queries, value_embed_dim=1)
    )


def attend_to_text(attn: Attention, query_BMQd: Tensor, text_BLD: Tensor, mask: Tensor | None) -> Tensor:
    """The layer's own cross-attention up to, not including, its output projection."""
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, text_BLD.shape[1], len(text_BLD))
        mask = mask.view(len(text_BLD), attn.heads, -1, mask.shape[-1])
    key_BMLd = split_heads(attn.to_k(text_BLD), attn.heads)
    value_BMLd = split_heads(attn.to_v(text_BLD), attn.heads)
    return join_heads(F.scaled_dot_product_attention(query_BMQd, key_BMLd, value_BMLd, attn_mask=mask))


def split_heads(states_BNC: Tensor, heads: int) -> Tensor:
    """B × N × (M d) → B × M × N × d."""
    return states_BNC.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(states_BMNd: Tensor) -> Tensor:
    """B × M × N × d → B × N × (M d)."""
    return states_BMNd.transpose(1, 2).flatten(2)


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
