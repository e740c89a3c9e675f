"""Kandinsky 2.1: an unCLIP in latent space, from a CLIP embedding and a text to a picture.

    embedding = (1 - w) · CLIP(image) + w · prior(text),   w = 0 for an empty text
    (embedding, text) → decoder → latents → MoVQ → picture

The prior is a diffusion model from a text to the embedding of a picture that would fit it; it samples by an ancestral
sampler whose noise is here the picture's own. "No image" is the embedding of a picture of zeros. The decoder keeps the
sampler of its checkpoint. Weights in kandinsky-community/kandinsky-2-1 and kandinsky-2-1-prior.

    method = Kandinsky21.from_pretrained()

Letters: B pictures, E width of CLIP ViT-L/14's embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers import KandinskyPipeline, KandinskyPriorPipeline
from torch import Tensor

from ipa.errors import UserError
from ipa.evaluation.methods.method import Prompt, Sampling
from ipa.evaluation.methods.pipelines import PipelineMethod, Source, draw_start, load_pipeline, pictures
from ipa.evaluation.methods.prompt_tokens import count_parameters


class Kandinsky21(PipelineMethod):
    """Prior and decoder; ``text_weight`` is w, ``prior_steps`` and ``prior_guidance`` are of the prior's sampling."""

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
        path: str = "kandinsky-community/kandinsky-2-1",
        prior_path: str = "kandinsky-community/kandinsky-2-1-prior",
        dtype: str = "float16",
        **options: Any,
    ) -> Self:
        """``options`` are the constructor's. Raises MissingWeights, ValueError for what cannot be read."""
        prior = load_pipeline(KandinskyPriorPipeline, Source(prior_path, key="method.prior_path"), dtype)
        return cls(prior, load_pipeline(KandinskyPipeline, Source(path), dtype), f"{path}, {prior_path}", **options)

    @property
    def image_size_px(self) -> int:
        return self.decoder.unet.config.sample_size * self.decoder.movq_scale_factor

    @property
    def trained(self) -> int:
        """The decoder's UNet, as the paper counts: pictures do not go through the prior."""
        return count_parameters(self.decoder.unet)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
        size_px = sampling.image_size_px or self.image_size_px
        cells = self.latent_cells(size_px)
        unet = self.decoder.unet
        noise_BCHW, generators = draw_start(prompts, (unet.config.in_channels, cells, cells))
        return self.decoder(
            [prompt.text for prompt in prompts],
            image_embeds=self.embeddings(prompts, generators),
            negative_image_embeds=self.prior.get_zero_embed(len(prompts)),
            latents=noise_BCHW.to(unet.device, unet.dtype),
            generator=generators,
            num_inference_steps=sampling.num_steps,
            guidance_scale=sampling.guidance,
            height=size_px,
            width=size_px,
            output_type="pt",
        ).images

    def latent_cells(self, size_px: int) -> int:
        """Edge of the latents; raises UserError for sizes that the pipeline would round up."""
        factor = self.decoder.movq_scale_factor
        if size_px % factor**2:
            raise UserError(f"{self.name} makes pictures whose size is a multiple of {factor**2} px, not of {size_px}")
        return size_px // factor

    def embeddings(self, prompts: Sequence[Prompt], generators: Sequence[torch.Generator]) -> Tensor:
        """embedding_BE, as the prior's ``interpolate`` mixes it for one picture."""
        mixed_BE = self.encode_images(prompts)
        rows = [row for row, prompt in enumerate(prompts) if prompt.text]
        if rows:
            told_BE = self.prior(
                [prompts[row].text for row in rows],
                generator=[generators[row] for row in rows],
                num_inference_steps=self.prior_steps,
                guidance_scale=self.prior_guidance,
            ).image_embeds
            mixed_BE[rows] = (1 - self.text_weight) * mixed_BE[rows] + self.text_weight * told_BE
        return mixed_BE

    def encode_images(self, prompts: Sequence[Prompt]) -> Tensor:
        encoder = self.prior.image_encoder
        pixels_B3HW = self.prior.image_processor(pictures(prompts), return_tensors="pt").pixel_values
        return encoder(pixels_B3HW.to(encoder.device, encoder.dtype)).image_embeds
