"""The head of Stable Diffusion 3's published adapters: a perceiver resampler that knows the denoising time.

    e = MLP(sinusoid(t));   x = W_in patches + e
    s₁, s₂, … = W_n SiLU(e)                                               for layer n
    q ← q + Attention(q̂; [LayerNorm(x), q̂]),   q̂ = LayerNorm(q) · (1 + scale₁) + shift₁
    q ← q + FeedForward(LayerNorm(q) · (1 + scale₂) + shift₂)
    tokens = LayerNorm(W_out q)

Every token has e in its last columns, which modulates the branches: so tokens of several images, and of rows at
different times, can be concatenated. Source: InstantX SD3.5-Large-IP-Adapter, ``IPAdapterTimeImageProjection`` of
diffusers. Letters here: W width of the queries and of e; the rest as in ``ipa.types``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ipa.adapter.heads import ResamplerHead
from ipa.adapter.resampler import PerceiverLayer
from ipa.types import EncoderWidths, Features


class TimePerceiverLayer(PerceiverLayer):
    """A perceiver layer whose inputs are scaled and shifted by the time; its published name is ``2.1``."""

    def __init__(self, width: int, heads: int, head_width: int, expansion: int) -> None:
        super().__init__(width, heads, head_width, expansion)
        self.append(nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width)))

    def forward(self, states_BPW: Tensor, queries_BTW: Tensor, time_BW: Tensor) -> Tensor:  # type: ignore[override]
        parts: list[Any] = list(self)
        attention, feed_forward, modulation = parts
        shift, scale, shift_ff, scale_ff = modulation(time_BW)[:, None].chunk(4, dim=-1)
        modulated_BTW = attention.norm2(queries_BTW) * (1 + scale) + shift
        queries_BTW = queries_BTW + attention.attend(attention.norm1(states_BPW), modulated_BTW)
        norm, *layers = feed_forward
        modulated_BTW = norm(queries_BTW) * (1 + scale_ff) + shift_ff
        for layer in layers:
            modulated_BTW = layer(modulated_BTW)
        return queries_BTW + modulated_BTW


class TimeResamplerHead(ResamplerHead):
    """``time_channels`` is the width of the sinusoid; the other sizes are those of ``ResamplerHead``."""

    depends_on_time = True
    made_for = "sd3"
    layer_class: ClassVar[type[PerceiverLayer]] = TimePerceiverLayer

    def __init__(
        self,
        patch_width: int,
        context_width: int,
        num_tokens: int = 64,
        width: int = 1280,
        heads: int = 20,
        depth: int = 4,
        head_width: int = 64,
        expansion: int = 4,
        time_channels: int = 320,
        no_image: str = "zeros",
    ) -> None:
        super().__init__(patch_width, context_width, num_tokens, width, heads, depth, head_width, expansion, no_image)
        self.time_channels = time_channels
        self.time_embedding = TimeEmbedding(time_channels, width)

    @classmethod
    def fitting(cls, encoder: EncoderWidths, context_width: int, width: int | None = 1280, **options: Any) -> Self:
        """``width`` must be the base's ``time_width``."""
        return super().fitting(encoder, context_width, width, **options)

    def forward(self, features: Features, t_B: Tensor | None = None) -> Tensor:
        """Read ``features.patches_BPF`` and the times, 0 … 1000. Return tokens, B × T × (D + W)."""
        assert features.patches_BPF is not None and t_B is not None, "this head reads patch features and the time"
        time_BW = self.time_embedding(t_B.expand(len(features.patches_BPF)))
        states_BPW = self.proj_in(features.patches_BPF.to(self.proj_in.weight.dtype)) + time_BW[:, None]
        queries_BTW = self.latents.expand(len(states_BPW), -1, -1)
        for layer in self.layers:
            queries_BTW = layer(states_BPW, queries_BTW, time_BW)
        tokens_BTD = self.norm_out(self.proj_out(queries_BTW))
        return torch.cat([tokens_BTD, time_BW[:, None].expand(-1, tokens_BTD.shape[1], -1).to(tokens_BTD)], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoid (cosines first), linear, SiLU, linear."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1, self.linear_2 = nn.Linear(channels, width), nn.Linear(width, width)

    def forward(self, t_B: Tensor) -> Tensor:
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t_B.device, dtype=torch.float32) / half)
        angles = t_B.float()[:, None] * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(sinusoid)))
