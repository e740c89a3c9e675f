"""Stable Diffusion 1.x and 2.x as a frozen family: one CLIP text encoder, a UNet, ε- or v-prediction.

family = StableDiffusion.from_pretrained("demo/base")
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ipa.families.latent_diffusion import LatentDiffusion
from ipa.types import BaseWidths, TextCondition


class StableDiffusion(LatentDiffusion):
    """1.x and 2.x differ by what their own configuration says: widths, heads, prediction type."""

    name = "stable_diffusion"
    pipeline_class = StableDiffusionPipeline
    absent: ClassVar = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }

    text_encoder: Any
    tokenizer: Any

    def __init__(
        self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any, source: str = ""
    ) -> None:
        super().__init__(
            source, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler
        )

    @torch.no_grad()
    def encode_ids(self, ids_BNL: Tensor, size_B6: Tensor | None = None) -> TextCondition:
        """One tokenizer's ids → states_BLD; sizes mean nothing to this family."""
        (ids_BL,) = ids_BNL.to(self.device).unbind(1)
        return TextCondition(self.text_encoder(ids_BL)[0])


def read_widths(path: str) -> BaseWidths:
    return StableDiffusion.read_widths(path)
