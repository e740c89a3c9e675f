"""One layer of the perceiver resampler (Jaegle et al. 2021; Alayrac et al. 2022), under its published names.

Letters here: W width of the queries, M heads, d head width; the rest as in ``ipa.types``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerceiverAttention(nn.Module):
    """Attention of T queries over the states and the queries; both are normalised first."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_width
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, states_BPW: Tensor, queries_BTW: Tensor) -> Tensor:
        return self.attend(self.norm1(states_BPW), self.norm2(queries_BTW))

    def attend(self, states_BPW: Tensor, queries_BTW: Tensor) -> Tensor:
        """Attention over inputs that are normalised already."""
        keys_values = self.to_kv(torch.cat([states_BPW, queries_BTW], dim=1)).chunk(2, dim=-1)
        query_BMTd, key_BMNd, value_BMNd = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(queries_BTW), *keys_values)
        )
        attended_BMTd = F.scaled_dot_product_attention(query_BMTd, key_BMNd, value_BMNd)
        return self.to_out(attended_BMTd.transpose(1, 2).flatten(2))


class PerceiverLayer(nn.ModuleList):
    """Attention and feed-forward with residuals; a list, since the published names index them ``0`` and ``1``."""

    def __init__(self, width: int, heads: int, head_width: int, expansion: int) -> None:
        feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, expansion * width, bias=False),
            nn.GELU(),
            nn.Linear(expansion * width, width, bias=False),
        )
        super().__init__([PerceiverAttention(width, heads, head_width), feed_forward])

    def forward(self, states_BPW: Tensor, queries_BTW: Tensor) -> Tensor:
        attention, feed_forward = self
        queries_BTW = queries_BTW + attention(states_BPW, queries_BTW)
        return queries_BTW + feed_forward(queries_BTW)
