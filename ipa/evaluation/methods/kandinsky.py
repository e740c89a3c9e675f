"""Kandinsky 2.1: an unCLIP in latent space, from a CLIP embedding and a text to an image.

    embedding = (1 - w) · CLIP(image) + w · prior(text),   w = 0 for an empty text
    (embedding, text) → decoder → latents → MoVQ → image

The prior is a diffusion model from a text to the embedding of a matching image; its ancestral sampler draws noise
from the image's own seed. "No image" is the embedding of an image of zeros. The decoder keeps the sampler of its
checkpoint. Weights in kandinsky-community/kandinsky-2-1 and kandinsky-2-1-prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers import KandinskyPipeline, KandinskyPriorPipeline
from torch import Tensor

from ipa.errors import UserError
from ipa.evaluation.methods.method import Prompt, draw_start
from ipa.evaluation.methods.pipelines import PipelineMethod, load_pipeline, to_pil
from ipa.evaluation.methods.weights import Source
from ipa.sampling import SamplingOptions
from ipa.weights import count_parameters


class Kandinsky21(PipelineMethod):
    """Prior and decoder; ``text_weight`` is w, ``prior_steps`` and ``prior_guidance`` are for sampling the prior."""

    name = "kandinsky21"
    uses_text = True

    def __init__(
        self,
        prior: Any,
        decoder: Any,
        source: str = "",
        text_weight: float = 0.5,
        prior_steps: int = 25,
        prior_guidance: float = 4.0,
    ) -> None:
        super().__init__(prior, decoder, source=source)
        self.prior, self.decoder, self.text_weight = prior, decoder, text_weight
        self.prior_steps, self.prior_guidance = prior_steps, prior_guidance

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        dtype: str = "float16",
        revision: str | None = None,
        prior_path: str = "kandinsky-community/kandinsky-2-1-prior",
        **options: Any,
    ) -> Self:
        """``options`` are the constructor's. Raises MissingWeights, and UserError for what cannot be read."""
        prior = load_pipeline(KandinskyPriorPipeline, Source(prior_path, "method.prior_path"), dtype)
        decoder = load_pipeline(KandinskyPipeline, Source(path, revision=revision), dtype)
        return cls(prior, decoder, f"{path}, {prior_path}", **options)

    @property
    def image_size_px(self) -> int:
        return self.decoder.unet.config.sample_size * self.decoder.movq_scale_factor

    @property
    def trained(self) -> int:
        """The decoder's UNet, as the paper counts; images do not pass through the prior."""
        return count_parameters(self.decoder.unet)

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingOptions) -> Tensor:
        size_px, factor = sampling.image_size_px or self.image_size_px, self.decoder.movq_scale_factor
        if size_px % factor**2:  # the pipeline would round it up
            raise UserError(f"sampling.image_size_px={size_px}: {self.name} needs a multiple of {factor**2}")
        unet, cells = self.decoder.unet, size_px // factor
        noise_BCHW, generators = draw_start(prompts, (unet.config.in_channels, cells, cells))
        return self.decoder(
            [prompt.text for prompt in prompts],
            image_embeds=self.embeddings(prompts, generators),
            negative_image_embeds=self.prior.get_zero_embed(len(prompts)),
            **self.pipeline_arguments(sampling, size_px),
            latents=noise_BCHW.to(unet.device, unet.dtype),
            generator=generators,
            output_type="pt",
        ).images

    def embeddings(self, prompts: Sequence[Prompt], generators: Sequence[torch.Generator]) -> Tensor:
        """embedding_BE, mixed as the prior's ``interpolate`` does it for one image."""
        encoder = self.prior.image_encoder
        pixels_B3HW = self.prior.image_processor(to_pil(prompts), return_tensors="pt").pixel_values
        mixed_BE = encoder(pixels_B3HW.to(encoder.device, encoder.dtype)).image_embeds
        if rows := [row for row, prompt in enumerate(prompts) if prompt.text]:
            text_BE = self.prior(
                [prompts[row].text for row in rows],
                generator=[generators[row] for row in rows],
                num_inference_steps=self.prior_steps,
                guidance_scale=self.prior_guidance,
            ).image_embeds
            mixed_BE[rows] = (1 - self.text_weight) * mixed_BE[rows] + self.text_weight * text_BE
        return mixed_BE
