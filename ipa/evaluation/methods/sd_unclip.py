"""SD unCLIP: Stable Diffusion 2.1 fine-tuned to read a CLIP embedding in addition to the text.

The embedding of CLIP ViT-H/14 is noised (Rombach et al. 2022; Ramesh et al. 2022), concatenated with the embedding of
the noise level, and added to the time embedding; "no image" is zeros. Level 0 adds very little noise, drawn from the
image's own seed. Weights in stabilityai/stable-diffusion-2-1-unclip, which was withdrawn in 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import StableUnCLIPImg2ImgPipeline
from torch import Tensor

from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.pipelines import LatentPipelineMethod, to_pil
from ipa.sampling import SamplingOptions


class SDUnCLIP(LatentPipelineMethod):
    """A ``StableUnCLIPImg2ImgPipeline``; ``noise_level`` is a step of its noise schedule, 0 to 999."""

    name = "sd_unclip"
    uses_text = True
    pipeline_class = StableUnCLIPImg2ImgPipeline

    def __init__(self, pipeline: Any, source: str = "", noise_level: int = 0) -> None:
        super().__init__(pipeline, source)
        self.noise_level = noise_level

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingOptions) -> Tensor:
        texts = [prompt.text for prompt in prompts]
        pixels_B3HW = self.call(prompts, sampling, image=to_pil(prompts), prompt=texts, noise_level=self.noise_level)
        self.pipeline.image_normalizer.requires_grad_(False)  # the pipeline's call replaces its parameters
        return pixels_B3HW
