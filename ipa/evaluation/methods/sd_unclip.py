"""SD unCLIP: Stable Diffusion 2.1 tuned to read a CLIP embedding beside the text.

The embedding of CLIP ViT-H/14 is noised (Rombach et al. 2022; Ramesh et al. 2022), joined with the embedding of the
noise level, and added to the time embedding; "no image" is zeros. At level 0 very little noise is left, drawn like the
rest from the picture's own seed. Weights in stabilityai/stable-diffusion-2-1-unclip, which was withdrawn in 2025.

    method = SDUnCLIP.from_pretrained("FOLDER")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from diffusers import StableUnCLIPImg2ImgPipeline
from torch import Tensor

from ipa.evaluation.methods.method import MissingWeights, Prompt, Sampling
from ipa.evaluation.methods.pipelines import LatentPipelineMethod, Source, load_pipeline, pictures
from ipa.evaluation.methods.prompt_tokens import count_parameters

HUB_ID = "stabilityai/stable-diffusion-2-1-unclip"


class SDUnCLIP(LatentPipelineMethod):
    """A ``StableUnCLIPImg2ImgPipeline``; ``noise_level`` is a step of its noise schedule, 0 to 999."""

    name = "sd_unclip"
    uses_text = True

    def __init__(self, pipeline: Any, source: str = "", noise_level: int = 0) -> None:
        super().__init__(pipeline, pipeline.unet, source)
        self.noise_level = noise_level

    @classmethod
    def from_pretrained(cls, path: str = HUB_ID, dtype: str = "float16", noise_level: int = 0) -> Self:
        """Raises MissingWeights for what is neither here nor to be had, ValueError for what cannot be read."""
        try:
            pipeline = load_pipeline(StableUnCLIPImg2ImgPipeline, Source(path), dtype)
        except MissingWeights as error:
            if path != HUB_ID:
                raise
            raise MissingWeights(f"{error}. Its owner withdrew {HUB_ID} in 2025: a copy has to be at hand") from error
        return cls(pipeline, path, noise_level)

    @property
    def trained(self) -> int:
        return count_parameters(self.unet)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
        texts = [prompt.text for prompt in prompts]
        pixels_B3HW = self.call(prompts, sampling, image=pictures(prompts), prompt=texts, noise_level=self.noise_level)
        self.pipeline.image_normalizer.requires_grad_(False)  # the pipeline's call makes its parameters anew
        return pixels_B3HW
