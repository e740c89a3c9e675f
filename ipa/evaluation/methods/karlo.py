"""Open unCLIP: Karlo, an unCLIP trained from scratch (Ramesh et al. 2022), from a CLIP embedding to an image.

    embedding of CLIP ViT-L/14 → decoder, 64 px → two super-resolution networks, 256 px

It works on pixels with its own ancestral sampler, which draws noise in every step, here from the image's own seed.
``sampling.num_steps`` are the decoder's steps; super-resolution has seven, the last with a network of its own. The text
stays empty. Weights in kakaobrain/karlo-v1-alpha-image-variations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UnCLIPImageVariationPipeline
from torch import Tensor

from ipa.errors import UserError
from ipa.evaluation.methods.method import Prompt, make_generators
from ipa.evaluation.methods.pipelines import PipelineMethod, to_pil
from ipa.sampling import SamplingOptions
from ipa.weights import count_parameters, dtype_name


class OpenUnCLIP(PipelineMethod):
    """An ``UnCLIPImageVariationPipeline``: its images have one size, 256 px."""

    name = "open_unclip"
    uses_text = False
    pipeline_class = UnCLIPImageVariationPipeline

    def __init__(self, pipeline: Any, source: str = "", super_res_steps: int = 7) -> None:
        super().__init__(pipeline, source=source)
        self.pipeline, self.super_res_steps = pipeline, super_res_steps

    @property
    def image_size_px(self) -> int:
        return self.pipeline.super_res_last.config.sample_size

    @property
    def trained(self) -> int:
        """The decoder and the projection of the embedding, as the paper counts; super-resolution sees no prompt."""
        return count_parameters(self.pipeline.decoder) + count_parameters(self.pipeline.text_proj)

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingOptions) -> Tensor:
        self.check_size_and_dtype(sampling.image_size_px)
        images_BHW3 = self.pipeline(
            image=to_pil(prompts),
            generator=make_generators(prompts),
            decoder_num_inference_steps=sampling.num_steps,
            super_res_num_inference_steps=self.super_res_steps,
            decoder_guidance_scale=sampling.guidance,
            output_type="np",
        ).images
        return torch.from_numpy(images_BHW3).permute(0, 3, 1, 2) * 2 - 1

    def check_size_and_dtype(self, size_px: int | None) -> None:
        if size_px not in (None, self.image_size_px):
            only = f"{self.name} makes images of {self.image_size_px} px only"
            raise UserError(f"sampling.image_size_px={size_px}: {only}")
        dtype = self.pipeline.decoder.dtype
        if self.pipeline.device.type == "cpu" and dtype != torch.float32:  # torch cannot resize half-precision images
            raise UserError(f"method.dtype={dtype_name(dtype)}: on a CPU {self.name} needs float32")
