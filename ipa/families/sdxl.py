"""Stable Diffusion XL as a frozen family: two CLIP text encoders, and sizes as a condition.

family = StableDiffusionXL.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", dtype="bfloat16")

Source: Podell et al. 2023, sections 2.1 (text) and 2.2 (sizes and crops).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLAdapterPipeline, StableDiffusionXLPipeline
from torch import Tensor

from ipa.errors import UserError
from ipa.families.latent_diffusion import LatentDiffusion
from ipa.families.unet_layout import TEXT_AND_SIZES
from ipa.types import TextCondition, TextInputs


class StableDiffusionXL(LatentDiffusion):
    """The base model, not its refiner."""

    name = "sdxl"
    title = "Stable Diffusion XL"
    advice = "base=sdxl (recipe=sdxl)"
    guidance = 5.0
    conditions = TEXT_AND_SIZES
    pipeline_class = StableDiffusionXLPipeline
    task_pipelines: ClassVar = {**LatentDiffusion.task_pipelines, "t2i_adapter": StableDiffusionXLAdapterPipeline}
    absent: ClassVar = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}

    text_encoder: Any
    text_encoder_2: Any

    @torch.no_grad()
    def text_states(self, inputs: TextInputs) -> TextInputs:
        """``states``, both encoders' penultimate ones concatenated, and ``pooled``, the second one's pooled text."""
        parts = (self.text_encoder, self.text_encoder_2)
        first, second = (
            part(ids_BL.to(part.device), output_hidden_states=True)
            for part, ids_BL in zip(parts, self.split_ids(inputs), strict=True)
        )
        states_BLD = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"states": states_BLD, "pooled": second.text_embeds}

    def text_condition(self, states: TextInputs, size_B6: Tensor | None = None) -> TextCondition:
        """Without ``size_B6``, every image is an uncropped one of the size that the UNet was trained for."""
        if size_B6 is None:
            edge = self.image_size_px
            size_B6 = torch.tensor([[edge, edge, 0, 0, edge, edge]]).expand(len(states["states"]), 6)
        # float32 whatever the weights' precision: bfloat16 has no numbers between 1020 and 1024
        return TextCondition(states["states"], states["pooled"], size_B6.to(self.device, torch.float32))

    def added_conditions(self, text: TextCondition) -> dict[str, Tensor]:
        assert text.pooled_BE is not None and text.size_B6 is not None, "SDXL's text comes from its encode_text"
        return {"text_embeds": text.pooled_BE.to(self.unet.dtype), "time_ids": text.size_B6}

    def prompt_arguments(self, positive: TextCondition, negative: TextCondition | None) -> dict[str, Any]:
        """The public pipeline takes one set of sizes per call: raises UserError if the rows differ."""
        arguments = super().prompt_arguments(positive, negative)
        sizes = [text.size_B6 for text in (positive, negative) if text is not None and text.size_B6 is not None]
        return arguments | (size_arguments(torch.cat(sizes)) if sizes else {})


def size_arguments(size_B6: Tensor) -> dict[str, tuple[int, int]]:
    """The sizes as the pipeline names them; all rows must be equal.

    The pipeline has ``negative_*`` sizes too, but repeats its two rows alternately while the texts are two halves, so
    that with more than one image they reach the wrong rows: negative texts must have the same sizes.
    """
    if not torch.equal(size_B6, size_B6[:1].expand_as(size_B6)):
        raise UserError(
            f"one call of the pipeline takes one set of sizes, but these differ: {size_B6.unique(dim=0).tolist()}. "
            "Group the pictures by size."
        )
    original, corner, target = (tuple(pair) for pair in size_B6[0].int().view(3, 2).tolist())
    return {"original_size": original, "crops_coords_top_left": corner, "target_size": target}
