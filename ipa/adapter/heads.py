"""Heads: image features → image tokens in the space that the base's cross-attention reads.

``fitting`` builds a head from the widths of an encoder and of a base. See `ipa.contracts.TokenHead`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from ipa.adapter.resampler import PerceiverLayer
from ipa.contracts import NoImage, TokenHead
from ipa.errors import UserError
from ipa.types import EncoderWidths, Features

NO_IMAGE = ("black", "blank", "zeros")


def patch_width(encoder: EncoderWidths) -> int:
    """F; raises UserError for an encoder without patch features."""
    if not encoder.patch:
        raise UserError(
            "this image encoder has no patch features, which a fine-grained head needs: choose tokens=global, or a "
            "vision transformer as the encoder"
        )
    return encoder.patch


class Head(TokenHead):
    """Base class of the heads here; checks their common options."""

    def __init__(self, num_tokens: int, context_width: int, no_image: str) -> None:
        super().__init__()
        if num_tokens < 1:
            raise UserError(
                f"tokens.num_tokens={num_tokens}: an adapter needs at least one image token; the paper has 4 for the "
                "global head and 16 for the fine-grained one"
            )
        if no_image not in NO_IMAGE:
            raise UserError(f"tokens.no_image={no_image}: give one of {', '.join(NO_IMAGE)}")
        self.num_tokens, self.context_width, self.no_image = num_tokens, context_width, cast(NoImage, no_image)

    @classmethod
    def fitting(cls, encoder: EncoderWidths, context_width: int, **options: Any) -> Self:
        """The head for these widths; ``options`` are the constructor's other arguments."""
        head: Any = cls
        return head(encoder.pooled if cls.uses == "pooled" else patch_width(encoder), context_width, **options)


class GlobalHead(Head):
    """Linear map and LayerNorm from the pooled embedding to T tokens (Ye et al. 2023, section 3.2.1).

    tokens = LayerNorm(reshape(W e + b)), where e is not normalised. "No image" is a zero embedding.
    """

    uses = "pooled"

    def __init__(self, embedding_width: int, context_width: int, num_tokens: int = 4, no_image: str = "zeros") -> None:
        super().__init__(num_tokens, context_width, no_image)
        self.embedding_width = embedding_width
        self.proj = self.make_proj(embedding_width, num_tokens * context_width)
        self.norm = nn.LayerNorm(context_width)

    @staticmethod
    def make_proj(embedding_width: int, width: int) -> nn.Module:
        return nn.Linear(embedding_width, width)

    def forward(self, features: Features, t_B: Tensor | None = None) -> Tensor:
        """Read ``features.pooled_BE``; ignore ``t_B``. Return tokens_BTD."""
        assert features.pooled_BE is not None, "this head reads pooled features"
        tokens = self.proj(features.pooled_BE.to(self.norm.weight.dtype))
        return self.norm(tokens.unflatten(-1, (self.num_tokens, self.context_width)))


class MLPHead(GlobalHead):
    """Two linear layers and LayerNorm from the pooled embedding to many tokens, as in InstantX' adapters for FLUX.

    tokens = LayerNorm(reshape(W₂ GELU(W₁ e + b₁) + b₂)); the middle layer is twice as wide as the embedding.
    """

    def __init__(
        self, embedding_width: int, context_width: int, num_tokens: int = 128, no_image: str = "zeros"
    ) -> None:
        super().__init__(embedding_width, context_width, num_tokens, no_image)

    @staticmethod
    def make_proj(embedding_width: int, width: int) -> nn.Module:
        middle = 2 * embedding_width
        return nn.Sequential(nn.Linear(embedding_width, middle), nn.GELU(), nn.Linear(middle, width))


class ResamplerHead(Head):
    """Learnable queries that read patch features through a perceiver resampler (Ye et al. 2023, section 4.4.2).

    x = W_in patches;  q ← q + Attention(q; [x, q]),  q ← q + FeedForward(q), ``depth`` times;
    tokens = LayerNorm(W_out q).   "No image" is a blank image in the published weights, zeros in the paper.

    ``width`` is the width of the queries, ``heads`` × ``head_width`` the inner width of attention, ``expansion`` the
    factor of the feed-forward layer. Other programs assume depth 4, head width 64 and expansion 4.
    """

    uses = "patches"
    layer_class: ClassVar[type[PerceiverLayer]] = PerceiverLayer

    def __init__(
        self,
        patch_width: int,
        context_width: int,
        num_tokens: int = 16,
        width: int = 768,
        heads: int = 12,
        depth: int = 4,
        head_width: int = 64,
        expansion: int = 4,
        no_image: str = "blank",
    ) -> None:
        super().__init__(num_tokens, context_width, no_image)
        self.width, self.heads, self.depth, self.head_width = width, heads, depth, head_width
        self.expansion = expansion
        self.latents = nn.Parameter(torch.randn(1, num_tokens, width) / width**0.5)
        self.proj_in = nn.Linear(patch_width, width)
        self.proj_out = nn.Linear(width, context_width)
        self.norm_out = nn.LayerNorm(context_width)
        self.layers = nn.ModuleList(self.layer_class(width, heads, head_width, expansion) for _ in range(depth))

    @classmethod
    def fitting(cls, encoder: EncoderWidths, context_width: int, width: int | None = None, **options: Any) -> Self:
        """``width`` None is the base's context width."""
        return super().fitting(encoder, context_width, width=width or context_width, **options)

    def describe(self) -> dict[str, str]:
        return {"head_width": str(self.head_width)}

    def forward(self, features: Features, t_B: Tensor | None = None) -> Tensor:
        """Read ``features.patches_BPF`` (penultimate layer, not normalised); ignore ``t_B``. Return tokens_BTD."""
        assert features.patches_BPF is not None, "the fine-grained head reads patch features"
        states_BPW = self.proj_in(features.patches_BPF.to(self.proj_in.weight.dtype))
        queries_BTW = self.latents.expand(len(states_BPW), -1, -1)
        for layer in self.layers:
            queries_BTW = layer(states_BPW, queries_BTW)
        return self.norm_out(self.proj_out(queries_BTW))


class FullHead(Head):
    """One token per patch feature, through two linear layers, as in the published full-face adapters.

    tokens = LayerNorm(W₂ GELU(W₁ patches)), T = P.
    """

    uses = "patches"

    def __init__(self, patch_width: int, context_width: int, num_tokens: int, no_image: str = "blank") -> None:
        super().__init__(num_tokens, context_width, no_image)
        self.proj = nn.Sequential(
            nn.Linear(patch_width, patch_width),
            nn.GELU(),
            nn.Linear(patch_width, context_width),
            nn.LayerNorm(context_width),
        )

    @classmethod
    def fitting(cls, encoder: EncoderWidths, context_width: int, **options: Any) -> Self:
        return super().fitting(encoder, context_width, num_tokens=encoder.num_patches, **options)

    def forward(self, features: Features, t_B: Tensor | None = None) -> Tensor:
        """Read ``features.patches_BPF``; ignore ``t_B``. Return tokens_BTD."""
        assert features.patches_BPF is not None, "the full head reads patch features"
        weight: Tensor = self.proj[0].weight  # type: ignore[assignment]
        return self.proj(features.patches_BPF.to(weight.dtype))
