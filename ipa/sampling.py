"""Pictures from a trained model: public diffusers pipelines with our denoiser in them. No samplers are written here.

Every picture has its own seed, so that a picture does not depend on the others in its batch beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ipa.model import IPAdapterModel
from ipa.types import Features, TextCondition


@dataclass(frozen=True)
class SamplingOptions:
    """``guidance`` as in diffusers (1 means none); ``scale`` is λ; the picture is ``image_size_px`` square."""

    num_steps: int = 25
    guidance: float = 2.0
    scale: float = 1.0
    image_size_px: int | None = None
    batch_size: int = 50

    def with_scale(self, scale: float) -> SamplingOptions:
        return replace(self, scale=scale)


@torch.no_grad()
def generate(
    model: IPAdapterModel, features: Features, texts: Sequence[str], seeds: Sequence[int], options: SamplingOptions
) -> Tensor:
    """One picture per row of ``features``: pixels_B3HW in [-1, 1] on the CPU.

    The unconditional half of guidance gets the empty text and the "no image" tokens at the same λ. With λ = 0 the
    image plays no part at all.
    """
    pieces = [
        _generate_batch(model, rows(features, piece), [texts[i] for i in piece], [seeds[i] for i in piece], options)
        for piece in torch.arange(len(texts)).split(options.batch_size)
    ]
    return torch.cat(pieces)


def _generate_batch(
    model: IPAdapterModel, features: Features, texts: list[str], seeds: list[int], options: SamplingOptions
) -> Tensor:
    pipeline = model.family.pipeline()
    positive, negative = model.family.encode_text(texts), model.family.encode_text([""] * len(texts))
    tokens = model.image_tokens(features)
    guided = options.guidance > 1
    states = torch.cat([negative.states_BLD, positive.states_BLD]) if guided else positive.states_BLD
    if guided:
        tokens = torch.cat([model.image_tokens(model.no_image(len(texts))), tokens])
    size_px = options.image_size_px or model.family.image_size_px
    with model.prompted(TextCondition(states), tokens, options.scale) as text:
        parts = text.states_BLD.chunk(2) if guided else (None, text.states_BLD)
        latents = pipeline(
            prompt_embeds=parts[1],
            negative_prompt_embeds=parts[0],
            latents=draw_noise(model.family.latent_shape(size_px), seeds).to(parts[1]),
            num_inference_steps=options.num_steps,
            guidance_scale=options.guidance,
            height=size_px,
            width=size_px,
            output_type="latent",
        ).images
    return model.family.decode_latents(latents).cpu()


def rows(features: Features, index: Tensor) -> Features:
    return Features(*(None if x is None else x[index.to(x.device)] for x in (features.pooled_BE, features.patches_BPF)))


def draw_noise(shape_CHW: tuple[int, int, int], seeds: Sequence[int]) -> Tensor:
    """Starting noise, each picture's from its own seed, drawn on the CPU so that every device starts alike."""
    return torch.stack([torch.randn(shape_CHW, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
