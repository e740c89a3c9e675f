"""SD Image Variations: Stable Diffusion 1.4 fine-tuned to read one CLIP embedding in place of the text.

The embedding of CLIP ViT-L/14 is the whole context, a single token; "no image" is zeros. It was trained on images
resized to a square without antialiasing, and its model card asks for the same, which makes a large difference.
Weights in lambdalabs/sd-image-variations-diffusers, revision v2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionImageVariationPipeline
from torch import Tensor

from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.pipelines import LatentPipelineMethod
from ipa.sampling import SamplingOptions


class SDImageVariations(LatentPipelineMethod):
    """A ``StableDiffusionImageVariationPipeline`` that reads images preprocessed as in its training."""

    name = "sd_image_variations"
    uses_text = False
    pipeline_class = StableDiffusionImageVariationPipeline
    absent: ClassVar = {"safety_checker": None, "requires_safety_checker": False}

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingOptions) -> Tensor:
        size_px = self.pipeline.image_encoder.config.image_size
        squares_B3HW = torch.stack([squeeze(prompt.image_3HW, size_px) for prompt in prompts])
        extractor = self.pipeline.feature_extractor
        mean, std = (torch.tensor(values)[:, None, None] for values in (extractor.image_mean, extractor.image_std))
        return self.call(prompts, sampling, image=(squares_B3HW - mean) / std)


def squeeze(image_3HW: Tensor, size_px: int) -> Tensor:
    """uint8 image of any size → square_3HW in [0, 1] (up to overshoot): bicubic, stretched, not antialiased."""
    return F.interpolate(image_3HW[None].float() / 255, (size_px, size_px), mode="bicubic", align_corners=False)[0]
