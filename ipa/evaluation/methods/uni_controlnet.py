"""Uni-ControlNet, its global adapter alone: four tokens from CLIP's image embedding, behind the text.

    tokens = GEGLU-MLP(LN(GEGLU-MLP(LN(e)))),   e = CLIP-L's projected image embedding, not normalised

"No image" is the adapter of a zero embedding, and λ weighs the tokens of both halves. Zhao et al. 2023,
"Uni-ControlNet: All-in-One Control to Text-to-Image Diffusion Models"; weights in shihaozhao/uni-controlnet.

    method = UniControlNet.from_pretrained()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ipa.encoders.vision_model import VisionModelEncoder
from ipa.evaluation.methods.prompt_tokens import PromptTokens, load_base, load_image_encoder, load_module, squares
from ipa.families.stable_diffusion import StableDiffusion


class GlobalAdapter(nn.Module):
    """Embedding_BD → tokens_BTD: width ×2, then ×``num_tokens``, each by a feed-forward layer on a layer norm."""

    def __init__(self, width: int = 768, num_tokens: int = 4) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.norm1 = nn.LayerNorm(width)
        self.ff1 = FeedForward(width, dim_out=2 * width, mult=4, activation_fn="geglu")
        self.norm2 = nn.LayerNorm(2 * width)
        self.ff2 = FeedForward(2 * width, dim_out=num_tokens * width, mult=num_tokens, activation_fn="geglu")

    @classmethod
    def like(cls, state: dict[str, Tensor]) -> Self:
        """As wide as these weights."""
        width = len(state["norm1.weight"])
        return cls(width, len(state["ff2.net.2.bias"]) // width)

    def forward(self, embedding_BD: Tensor) -> Tensor:
        wide = self.ff1(self.norm1(embedding_BD))
        return self.ff2(self.norm2(wide)).unflatten(-1, (self.num_tokens, -1))


class UniControlNet(PromptTokens):
    """The global control of Uni-ControlNet; its local controls are not given."""

    name = "uni_controlnet"
    adapter: GlobalAdapter

    def __init__(
        self, family: StableDiffusion, encoder: VisionModelEncoder, adapter: GlobalAdapter, source: str = ""
    ) -> None:
        super().__init__(family, source)
        self.encoder, self.adapter = encoder, adapter
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        image_encoder: str = "openai/clip-vit-large-patch14",
        adapter: str = "shihaozhao/uni-controlnet/uni.ckpt",
        dtype: str = "float16",
    ) -> Self:
        """Of ``adapter`` only ``global_adapter.*`` is read. Raises MissingWeights for what is not to be had."""
        made = load_module(GlobalAdapter.like, adapter, "method.adapter", "a Uni-ControlNet", "global_adapter.")
        family, encoder = load_base(base, dtype), load_image_encoder(image_encoder, dtype)
        return cls(family, encoder, made.to(family.dtype), f"{adapter} on {base}")

    def encode(self, images: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
        pictures = squares(images, self.encoder.image_size_px).to(self.family.device)
        embedding_BD = self.encoder.encode(pictures).pooled_BE
        assert embedding_BD is not None
        return scale * self.adapter(embedding_BD), scale * self.adapter(torch.zeros_like(embedding_BD))
