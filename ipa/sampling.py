"""Pictures from a trained model: public diffusers pipelines with our denoiser in them. No samplers are written here.

Every picture has its own seed, so that a picture does not depend on the others in its batch beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ipa.errors import UserError
from ipa.model import IPAdapterModel
from ipa.types import Features, TextCondition


@dataclass(frozen=True)
class SamplingOptions:
    """``guidance`` as in diffusers (1 means none); ``scale`` is λ; the picture is ``image_size_px`` square.

    ``guidance_rescale`` φ in [0, 1] takes back the contrast that guidance adds,
    x = φ · x_cfg · std(x_pos) / std(x_cfg) + (1 − φ) · x_cfg (Lin et al. 2023, eq. 15 and 16, who take 0.7);
    for bases with zero terminal SNR, as the demo's.
    Raises UserError for any other φ.
    """

    num_steps: int = 25
    guidance: float = 2.0
    scale: float = 1.0
    image_size_px: int | None = None
    batch_size: int = 50
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale={self.guidance_rescale}: from 0 (none) to 1; 0.7 is usual")

    def with_scale(self, scale: float) -> SamplingOptions:
        return replace(self, scale=scale)


Images = Features | Sequence[Features]


@torch.no_grad()
def generate(
    model: IPAdapterModel, features: Images, texts: Sequence[str], seeds: Sequence[int], options: SamplingOptions
) -> Tensor:
    """One picture per row of ``features``, or of every one of several image prompts: pixels_B3HW in [-1, 1] on the CPU.

    The unconditional half of guidance gets the empty text and the "no image" tokens at the same λ. With λ = 0 the
    image plays no part at all.
    """
    images = [features] if isinstance(features, Features) else list(features)
    pieces = []
    for index in torch.arange(len(texts)).split(options.batch_size):
        chosen = [rows(image, index) for image in images]
        pieces.append(_generate_batch(model, chosen, [texts[i] for i in index], [seeds[i] for i in index], options))
    return torch.cat(pieces)


def _generate_batch(
    model: IPAdapterModel, images: list[Features], texts: list[str], seeds: list[int], options: SamplingOptions
) -> Tensor:
    size_px = options.image_size_px or model.family.image_size_px
    guided = options.guidance > 1
    with prompt_arguments(model, images, texts, options.scale, size_px, guided) as arguments:
        latents = (
            model.family.pipeline()(
                **arguments,
                latents=draw_noise(model.family.latent_shape(size_px), seeds).to(arguments["prompt_embeds"]),
                num_inference_steps=options.num_steps,
                guidance_scale=options.guidance,
                guidance_rescale=options.guidance_rescale,
                height=size_px,
                width=size_px,
                output_type="latent",
            )
        ).images
    return model.family.decode_latents(latents).cpu()


@contextmanager
def prompt_arguments(
    model: IPAdapterModel,
    images: Sequence[Features],
    texts: Sequence[str],
    scale: float = 1.0,
    size_px: int | None = None,
    guided: bool = True,
) -> Iterator[dict[str, Any]]:
    """While inside, ``model.family.pipeline()`` sees the image prompts; yields the arguments to call it with.

    They are the encoded text and, of a simple adapter, the image tokens behind it: those serve any public pipeline on
    the same base, as ``prompt_embeds`` and ``negative_prompt_embeds``, also after leaving.
    """
    size_B6 = whole_picture(size_px or model.family.image_size_px, len(texts))
    conditions = [model.family.encode_text(list(texts), size_B6)]
    tokens = [model.image_tokens(*images)]
    if guided:
        conditions.insert(0, model.family.encode_text([""] * len(texts), size_B6))
        tokens.insert(0, model.image_tokens(*[model.no_image(len(texts))] * len(images)))
    with model.prompted(joined(conditions), torch.cat(tokens), scale) as text:
        negative, positive = halves(text) if guided else (None, text)
        yield model.family.prompt_arguments(positive, negative)


def whole_picture(size_px: int, batch: int) -> Tensor:
    """The size condition of square pictures that are not cut: size_B6."""
    return torch.tensor([[size_px, size_px, 0, 0, size_px, size_px]]).expand(batch, -1)


def joined(conditions: Sequence[TextCondition]) -> TextCondition:
    """The rows of all conditions, one after the other."""
    found = {
        field.name: [getattr(condition, field.name) for condition in conditions] for field in fields(TextCondition)
    }
    whole: dict[str, Any] = {name: None if parts[0] is None else torch.cat(parts) for name, parts in found.items()}
    return TextCondition(**whole)


def halves(condition: TextCondition) -> tuple[TextCondition, TextCondition]:
    """The first and the second half of the rows."""
    split: dict[str, Any] = {name: (None, None) if x is None else x.chunk(2) for name, x in vars(condition).items()}
    first, second = (TextCondition(**{name: parts[i] for name, parts in split.items()}) for i in (0, 1))
    return first, second


def rows(features: Features, index: Tensor) -> Features:
    return features.map(lambda x: x[index.to(x.device)])


def draw_noise(shape_CHW: tuple[int, int, int], seeds: Sequence[int]) -> Tensor:
    """Starting noise, each picture's from its own seed, drawn on the CPU so that every device starts alike."""
    return torch.stack([torch.randn(shape_CHW, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
