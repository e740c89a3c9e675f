"""Uni-ControlNet with its global adapter only: four tokens from CLIP's image embedding, after the text.

    tokens = GEGLU-MLP(LN(GEGLU-MLP(LN(e)))),   e = CLIP-L's projected image embedding, not normalised

"No image" is the adapter of a zero embedding, and λ weights the tokens of both halves. Zhao et al. 2023,
"Uni-ControlNet: All-in-One Control to Text-to-Image Diffusion Models"; weights in shihaozhao/uni-controlnet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.prompt_tokens import ClipPromptTokens


class GlobalAdapter(nn.Module):
    """Embedding_BD → tokens_BTD: width ×2, then ×``num_tokens``, each with a feed-forward layer after a layer norm."""

    def __init__(self, width: int = 768, num_tokens: int = 4) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.norm1 = nn.LayerNorm(width)
        self.ff1 = FeedForward(width, dim_out=2 * width, mult=4, activation_fn="geglu")
        self.norm2 = nn.LayerNorm(2 * width)
        self.ff2 = FeedForward(2 * width, dim_out=num_tokens * width, mult=num_tokens, activation_fn="geglu")

    def forward(self, embedding_BD: Tensor) -> Tensor:
        wide = self.ff1(self.norm1(embedding_BD))
        return self.ff2(self.norm2(wide)).unflatten(-1, (self.num_tokens, -1))


class UniControlNet(ClipPromptTokens):
    """The global control of Uni-ControlNet, without its local controls."""

    name = "uni_controlnet"
    adapter: GlobalAdapter
    make_adapter = GlobalAdapter
    published = ("a Uni-ControlNet", "global_adapter.")

    def encode(self, prompts: Sequence[Prompt], scale: float) -> tuple[Tensor, Tensor]:
        embedding_BD = self.encoder.encode(self.squares(prompts)).pooled_BE
        assert embedding_BD is not None
        return scale * self.adapter(embedding_BD), scale * self.adapter(torch.zeros_like(embedding_BD))
