"""Images from a trained model, by public diffusers pipelines around its denoiser.

Every image has its own seed, so the other images of its batch change only its rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ipa.contracts import Family
from ipa.errors import UserError
from ipa.model import IPAdapterModel
from ipa.ranges import TRAINING_STEPS
from ipa.types import Features, ImageCondition, TextCondition

RECORDED = ("num_steps", "guidance", "guidance_rescale", "image_size_px")


@dataclass(frozen=True)
class SamplingOptions:
    """``guidance`` as in diffusers (1 means none); ``scale`` is λ; images are ``image_size_px`` square.

    ``guidance_rescale`` φ in [0, 1] removes the contrast that guidance adds,
    x = φ · x_cfg · std(x_pos) / std(x_cfg) + (1 − φ) · x_cfg (Lin et al. 2023, eq. 15 and 16, who use 0.7);
    for bases with zero terminal SNR, such as the demo's.
    Raises UserError for any other φ, for an impossible number of steps, and for empty batches.
    """

    num_steps: int = 25
    guidance: float = 2.0
    scale: float = 1.0
    image_size_px: int | None = None
    batch_size: int = 50
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= TRAINING_STEPS:
            raise UserError(f"num_steps={self.num_steps}: from 1 to {TRAINING_STEPS}, the steps of the noise schedule")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: images that are made together, at least 1")
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale={self.guidance_rescale}: from 0 (none) to 1; 0.7 is usual")

    def describe(self) -> dict[str, str]:
        """Metadata of an adapter file: the sampling of its training, which `ipa.tools.sample` uses as defaults."""
        options = {name: getattr(self, name) for name in RECORDED}
        return {f"sampling_{name}": str(value) for name, value in options.items() if value is not None}

    def with_scale(self, scale: float) -> SamplingOptions:
        return replace(self, scale=scale)


def recorded_options(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The options that ``SamplingOptions.describe`` wrote into the metadata, without those that are no numbers."""
    found: dict[str, Any] = {}
    for name in RECORDED:
        with suppress(KeyError, ValueError):
            number = float(metadata[f"sampling_{name}"])
            found[name] = int(number) if number.is_integer() and name in ("num_steps", "image_size_px") else number
    return found


Images = Features | Sequence[Features]


@torch.no_grad()
def generate(
    model: IPAdapterModel, features: Images, texts: Sequence[str], seeds: Sequence[int], options: SamplingOptions
) -> Tensor:
    """One image per row of ``features``, or of each of several image prompts: pixels_B3HW in [-1, 1] on the CPU.

    The unconditional half of guidance gets the empty text and the "no image" tokens at the same λ. With λ = 0 the
    image has no influence.
    """
    images = [features] if isinstance(features, Features) else features
    family, pieces = model.family, []
    size = (family.check_size(options.image_size_px or family.image_size_px, "sampling.image_size_px"),) * 2
    for index in torch.arange(len(texts)).split(options.batch_size):
        prompts = [ImageCondition([rows(image, index) for image in images], scale=options.scale)]
        with prompt_arguments([(model, prompts)], [texts[i] for i in index], size, options.guidance > 1) as arguments:
            pieces.append(run_pipeline(family, family.pipeline(), arguments, [seeds[i] for i in index], size, options))
    return torch.cat(pieces)


def run_pipeline(
    family: Family,
    pipeline: Any,
    arguments: Mapping[str, Any],
    seeds: Sequence[int],
    size: tuple[int, int],
    options: SamplingOptions,
) -> Tensor:
    """One call of a public pipeline: an image per seed, pixels_B3HW in [-1, 1] on the CPU; ``size`` is (width, height).

    Noise, guidance and size are passed if the pipeline takes them. Raises UserError for a rescaling that it lacks.
    """
    known, shape = inspect.signature(pipeline.__call__).parameters, latent_shape(family, size)
    given = family.guidance_arguments(options.guidance, options.guidance_rescale)
    if options.guidance_rescale and given.keys() - known.keys():
        raise UserError(f"guidance_rescale={options.guidance_rescale}: {type(pipeline).__name__} has none, give 0")
    given |= {"width": size[0], "height": size[1]}
    given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]  # for further noise
    if "strength" not in known:  # with given latents, a pipeline that starts from an image would not start from it
        given["latents"] = family.pack(draw_noise(shape, seeds)).to(family.device, family.dtype)
    latents = pipeline(
        **arguments,
        **{name: value for name, value in given.items() if name in known},
        num_inference_steps=options.num_steps,
        output_type="latent",
    ).images
    return family.decode_latents(family.unpack(latents, shape)).cpu()


def latent_shape(family: Family, size: tuple[int, int]) -> tuple[int, int, int]:
    """C, H, W of the latents of an image of this width and height."""
    edge = family.image_size_px
    channels, height, width = family.latent_shape(edge)
    return channels, height * size[1] // edge, width * size[0] // edge


@contextmanager
def prompt_arguments(
    prompts: Sequence[tuple[IPAdapterModel, Sequence[ImageCondition]]],
    texts: Sequence[str],
    size: tuple[int, int] | None = None,
    guided: bool = True,
    negative_texts: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """While inside, pipelines of the base see the image prompts; yields the arguments to call them with.

    ``prompts`` are models of one base, each with its image prompts; ``size`` is the images' width and height.
    The arguments are the encoded text, followed by the image tokens of a simple adapter.
    """
    family = prompts[0][0].family
    width, height = size or (family.image_size_px,) * 2
    size_B6 = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(texts), -1)
    encoded: tuple[TextCondition, TextCondition | None] = family.encode_text(list(texts), size_B6), None
    if guided:
        encoded = encoded[0], family.encode_text(list(negative_texts or [""] * len(texts)), size_B6)
    with ExitStack() as stack:
        for model, conditions in prompts:
            encoded = stack.enter_context(model.guided(*encoded, conditions))
        yield family.prompt_arguments(*encoded)


def rows(features: Features, index: Tensor) -> Features:
    return features.map(lambda x: x[index.to(x.device)])


def draw_noise(shape_CHW: tuple[int, int, int], seeds: Sequence[int]) -> Tensor:
    """Initial noise from each image's own seed, drawn on the CPU so that it is the same on every device."""
    return torch.stack([torch.randn(shape_CHW, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
