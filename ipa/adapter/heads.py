"""Heads: image features → image tokens in the space that the base's cross-attention reads."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ipa.types import Features


class GlobalHead(nn.Module):
    """Linear map and LayerNorm from the pooled embedding to T tokens (Ye et al. 2023, section 3.2.1).

    tokens = LayerNorm(reshape(W e + b)), with e not normalised. "No image" is a zero embedding.
    """

    uses: Literal["pooled"] = "pooled"
    no_image: Literal["zeros"] = "zeros"

    def __init__(self, embedding_width: int, context_width: int, num_tokens: int = 4) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(
                f"tokens.num_tokens={num_tokens}: an adapter needs at least one image token; the paper has 4"
            )
        self.num_tokens = num_tokens
        self.context_width = context_width
        self.proj = nn.Linear(embedding_width, num_tokens * context_width)
        self.norm = nn.LayerNorm(context_width)

    def forward(self, features: Features, t_B: Tensor | None = None) -> Tensor:
        """Read ``features.pooled_BE``, ignore ``t_B``; return tokens_BTD."""
        assert features.pooled_BE is not None, "the global head reads pooled features"
        tokens = self.proj(features.pooled_BE.to(self.proj.weight.dtype))
        return self.norm(tokens.unflatten(-1, (self.num_tokens, self.context_width)))
