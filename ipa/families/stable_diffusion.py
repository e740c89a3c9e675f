"""Stable Diffusion 1.x and 2.x as a frozen family: one CLIP text encoder, a UNet, ε- or v-prediction.

family = StableDiffusion.from_pretrained("demo/base")
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ipa.families.latent_diffusion import LatentDiffusion
from ipa.families.unet_layout import TEXT_ALONE
from ipa.types import TextCondition, TextInputs


class StableDiffusion(LatentDiffusion):
    """1.x and 2.x differ only in their configuration: widths, heads, prediction type."""

    name = "stable_diffusion"
    title = "Stable Diffusion 1.x or 2.x"
    advice = "base=sd15 or base=sd21 (recipe=sd15)"
    conditions = TEXT_ALONE
    pipeline_class = StableDiffusionPipeline
    absent: ClassVar = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }

    text_encoder: Any

    @torch.no_grad()
    def text_states(self, inputs: TextInputs) -> TextInputs:
        """One tokenizer's ids → ``states``, B × L × D."""
        (ids_BL,) = self.split_ids(inputs)
        return {"states": self.text_encoder(ids_BL.to(self.text_encoder.device))[0]}

    def text_condition(self, states: TextInputs, size_B6: Tensor | None = None) -> TextCondition:
        """This family has no size condition."""
        return TextCondition(states["states"])

    def added_conditions(self, text: TextCondition) -> None:
        return None
