"""The attention layers of Stable Diffusion 3 as hosts, as InstantX publishes them and diffusers reads them.

Every attention layer has a branch, the second one of blocks with dual attention included. The image stream attends once
more to itself and to the image tokens, without the text, before the output projection:

    i = AdaLN(c; e),   K′ = RMSNorm(W′_k i),   V′ = W′_v i
    out += λ softmax(RMSNorm(Q) [RMSNorm(K), K′]ᵀ / √d) [V, V′]

Q, K and V are those of the layer's image stream before its norms; the norms above are the adapter's. V′ = 0 does not
make this a no-op, since self-attention is repeated; only λ = 0 does. e is the head's time embedding, in the last
columns of the tokens (`ipa.adapter.time_resampler`); tokens without it are modulated by the bias alone.

Letters here: those of `ipa.families.attention_host`; W width of e.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from ipa.families.attention_host import AttentionHost, BranchProcessor, Once, every_time, join_heads, split_heads


class Projected(NamedTuple):
    """Q, K and V, B × M × N × d."""

    query: Tensor
    key: Tensor
    value: Tensor


class TimeNorm(nn.Module):
    """AdaLN: LayerNorm without weights, scaled and shifted by the time embedding."""

    def __init__(self, time_width: int, width: int, **factory: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(time_width, 2 * width, **factory)

    def forward(self, tokens_BTD: Tensor, time_BTW: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(time_BTW)).chunk(2, dim=-1)
        return F.layer_norm(tokens_BTD, tokens_BTD.shape[-1:], eps=1e-6) * (1 + scale) + shift


class SD3Branch(nn.Module):
    """One layer's branch, under its published names."""

    def __init__(self, attention: Attention, time_width: int, key_std: float, value_std: float) -> None:
        super().__init__()
        self.heads, width = attention.heads, attention.to_q.out_features
        factory: dict[str, Any] = {"device": attention.to_q.weight.device, "dtype": torch.float32}
        self.norm_ip = TimeNorm(time_width, width, **factory)
        self.to_k_ip = nn.Linear(width, width, bias=False, **factory)
        self.to_v_ip = nn.Linear(width, width, bias=False, **factory)
        norms = (RMSNorm(width // self.heads, eps=1e-6).to(**factory) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_ip_k = norms
        for layer, std in ((self.to_k_ip, key_std), (self.to_v_ip, value_std)):
            nn.init.normal_(layer.weight, std=std)

    def forward(
        self, image: Projected, tokens_BTX: Tensor, time: Tensor | None, scale: Tensor, once: Once = every_time
    ) -> Tensor:
        """Return λ times the attention as B × N × (M d); ``tokens_BTX`` end with e, ``time`` is unused."""
        dtype = image.query.dtype
        key_BMTd, value_BMTd = once((self, dtype), lambda: self.project(tokens_BTX))
        keys = torch.cat([self.norm_k(image.key).to(dtype), key_BMTd.to(dtype)], dim=2)
        values = torch.cat([image.value, value_BMTd.to(dtype)], dim=2)
        attended = F.scaled_dot_product_attention(self.norm_q(image.query).to(dtype), keys, values)
        return scale.to(dtype) * join_heads(attended)

    def project(self, tokens_BTX: Tensor) -> tuple[Tensor, Tensor]:
        """K′ and V′, both B × M × T × d."""
        width, time_width = self.to_k_ip.in_features, self.norm_ip.linear.in_features
        tokens_BTD, time_BTW = tokens_BTX[..., :width], tokens_BTX[..., width:]
        if not time_BTW.shape[-1]:
            time_BTW = tokens_BTD.new_zeros(time_width)
        normed = self.norm_ip(tokens_BTD, time_BTW)
        key, value = split_heads(self.to_k_ip(normed), self.heads), split_heads(self.to_v_ip(normed), self.heads)
        return self.norm_ip_k(key), value


class SD3Processor(BranchProcessor):
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *positional: Any,
        **named: Any,
    ) -> Any:
        prompts = self.acting()
        if not prompts:
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, *positional, **named)
        image, length = project(attn, hidden_states), hidden_states.shape[1]
        attended_BNC = attend(attn, image, encoder_hidden_states)
        own_BQC, text_BLC = attended_BNC[:, :length], attended_BNC[:, length:]
        image_BQC = own_BQC
        for branch, prompt in prompts:
            added_BQC = branch(image, prompt.tokens_BTD, None, prompt.scale_at(self.host), prompt.once)
            image_BQC = image_BQC + self.added(prompt, own_BQC, added_BQC)
        out: Any = attn.to_out[1](attn.to_out[0](image_BQC))
        if encoder_hidden_states is None:
            return out
        return out, text_BLC if attn.context_pre_only else attn.to_add_out(text_BLC)


def project(attn: Attention, states_BNC: Tensor) -> Projected:
    """Q, K and V of the image stream, not normalised."""
    layers: tuple[Any, ...] = (attn.to_q, attn.to_k, attn.to_v)
    return Projected(*(split_heads(layer(states_BNC), attn.heads) for layer in layers))


def attend(attn: Attention, image: Projected, text_BLC: Tensor | None) -> Tensor:
    """The layer's own attention of image (first) and text, B × N × (M d)."""
    norms: list[Any] = [attn.norm_q, attn.norm_k, None]
    own = [states if norm is None else norm(states) for norm, states in zip(norms, image, strict=True)]
    if text_BLC is not None:
        layers: tuple[Any, ...] = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = [attn.norm_added_q, attn.norm_added_k, None]
        added = [split_heads(layer(text_BLC), attn.heads) for layer in layers]
        added = [states if norm is None else norm(states) for norm, states in zip(norms, added, strict=True)]
        own = [torch.cat(pair, dim=2) for pair in zip(own, added, strict=True)]
    query, key, value = own
    return join_heads(F.scaled_dot_product_attention(query, key, value))


class SD3Host(AttentionHost):
    """One attention layer; ``start`` are the standard deviations of K′ and V′ at the beginning of a training."""

    processor_class = SD3Processor

    def __init__(
        self, name: str, attention: Attention, block: str, time_width: int, start: tuple[float, float]
    ) -> None:
        super().__init__(name, attention, block)
        self.time_width, self.start = time_width, start

    def make_branch(self) -> SD3Branch:
        return SD3Branch(self.attention, self.time_width, *self.start)


def find_hosts(transformer: Any, time_width: int, start: tuple[float, float] = (0.02, 0.0)) -> list[SD3Host]:
    """All attention layers in the order of diffusers' attention processors: ``attn``, then ``attn2`` of each block."""
    return [
        SD3Host(f"transformer_blocks.{index}.{name}", attention, f"transformer_blocks.{index}", time_width, start)
        for index, block in enumerate(transformer.transformer_blocks)
        for name in ("attn", "attn2")
        if (attention := getattr(block, name)) is not None
    ]
