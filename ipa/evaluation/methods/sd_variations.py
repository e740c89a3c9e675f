"""SD Image Variations: Stable Diffusion 1.4 tuned to read one CLIP embedding in place of the text.

The embedding of CLIP ViT-L/14 is the whole context, a single token; "no image" is zeros. It was trained on pictures
squeezed to a square without antialiasing, and its card asks for the same: the difference is large.
Weights in lambdalabs/sd-image-variations-diffusers, revision v2.0.

    method = SDImageVariations.from_pretrained()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionImageVariationPipeline
from torch import Tensor

from ipa.evaluation.methods.method import Prompt, Sampling
from ipa.evaluation.methods.pipelines import LatentPipelineMethod, Source, load_pipeline
from ipa.evaluation.methods.prompt_tokens import count_parameters


class SDImageVariations(LatentPipelineMethod):
    """A ``StableDiffusionImageVariationPipeline`` that is given pictures as its training saw them."""

    name = "sd_image_variations"
    uses_text = False

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, pipeline.unet, source)

    @classmethod
    def from_pretrained(
        cls,
        path: str = "lambdalabs/sd-image-variations-diffusers",
        revision: str | None = "v2.0",
        dtype: str = "float16",
    ) -> Self:
        """``revision`` is for the hub alone. Raises MissingWeights, ValueError for what cannot be read."""
        unsafe = {"safety_checker": None, "requires_safety_checker": False}
        return cls(load_pipeline(StableDiffusionImageVariationPipeline, Source(path, revision), dtype, **unsafe), path)

    @property
    def trained(self) -> int:
        return count_parameters(self.unet)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
        edge = self.pipeline.image_encoder.config.image_size
        squeezed_B3HW = torch.stack([squeeze(prompt.image_3HW, edge) for prompt in prompts])
        extractor = self.pipeline.feature_extractor
        mean, std = (torch.tensor(values)[:, None, None] for values in (extractor.image_mean, extractor.image_std))
        return self.call(prompts, sampling, image=(squeezed_B3HW - mean) / std)


def squeeze(image_3HW: Tensor, edge: int) -> Tensor:
    """uint8 picture of any size → square_3HW in [0, 1] (up to overshoot): bicubic, proportions lost, no antialias."""
    return F.interpolate(image_3HW[None].float() / 255, (edge, edge), mode="bicubic", align_corners=False)[0]
