"""Adapters on a base, ready to be used: images and text in, images out.

    prompter = Prompter.load("adapter.safetensors")
    (image,) = prompter("cat.png", "on a beach", scale=0.7, seed=1)

Several images, masks, λ per block and over time, several adapters: see `Reference`. A different reference for every
image of a batch: `Prompter.generate`. Any public pipeline on the same base (ControlNet, image to image, inpainting,
LoRA): ``pipeline_class=`` with its own arguments, or `Prompter.prompted` around a pipeline of your own.

Several prompts of one adapter, or of several, add up to (Ye et al. 2023, equation 5, one term per prompt i)

    Z = Attention(Q, K, V) + Σ_i λ_i m_i ⊙ Attention(Q, K′_i, V′_i)

with λ_i of the block and the time, and mask m_i. Images of one prompt share one softmax.
"""

from __future__ import annotations

import inspect
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from torch import Tensor

from ipa.contracts import Family
from ipa.data.images.transforms import Opened, fit_reference, open_picture, read_picture
from ipa.errors import UserError
from ipa.export.loading import load_model, load_onto
from ipa.model import IPAdapterModel
from ipa.presets import BlockWeights, read_blocks
from ipa.sampling import draw_noise
from ipa.types import Features, ImageCondition, TextCondition, to_uint8

log = logging.getLogger(__name__)

Picture = str | Path | Image.Image
Pictures = Picture | Sequence[Picture]

# on the encoder's features, before the head; N images, all with weights applied
COMBINE: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "concat": lambda each: each,
    "add": lambda each: [torch.stack(each).sum(0)],
    "average": lambda each: [torch.stack(each).mean(0)],
    "subtract": lambda each: [each[0] - torch.stack(each[1:]).mean(0)],
    "norm average": lambda each: [torch.stack([x / x.norm(dim=-1, keepdim=True) for x in each]).mean(0)],
    "max": lambda each: [torch.stack(each).amax(0)],
    "min": lambda each: [torch.stack(each).amin(0)],
}


@dataclass(frozen=True)
class Reference:
    """One image prompt: its images, and how they act.

    ``scale`` is λ. ``blocks`` is a preset's name or a mapping of blocks to factors of λ (`ipa.presets`). The prompt
    acts from ``start`` to ``end``, fractions of the training's noise schedule, with ``curve`` of the progress in
    between. ``mask`` is white where it acts. ``combine`` says how several images become one prompt, one of ``COMBINE``;
    ``weights`` multiply their features. ``negative`` images take the place of "no image" in guidance's negative part.
    ``adapter`` is the adapter's number.
    """

    images: Pictures
    scale: float = 1.0
    blocks: str | Any = None
    start: float = 0.0
    end: float = 1.0
    curve: Callable[[float], float] | None = None
    mask: Picture | None = None
    combine: str = "concat"
    weights: Sequence[float] | None = None
    negative: Pictures | None = None
    adapter: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for values that mean nothing."""
        count = len(as_list(self.images))
        if not (self.scale >= 0 and self.scale < float("inf")):
            raise UserError(f"scale={self.scale}: λ is a number of at least 0")
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(f"start={self.start} end={self.end}: give 0 ≤ start ≤ end ≤ 1")
        if self.combine not in COMBINE:
            raise UserError(f"combine={self.combine}: give one of {', '.join(COMBINE)}")
        if count == 0 or (count == 1 and self.combine == "subtract"):
            raise UserError(f"combine={self.combine} needs {'two images' if count else 'an image'} or more")
        if self.weights is not None and len(self.weights) != count:
            raise UserError(f"weights={list(self.weights)}: give one for each of the {count} images")

    def form(self) -> Any:
        """Prompts of one form can be in one batch; images, masks and λ may differ."""
        blocks = tuple(self.blocks.items()) if hasattr(self.blocks, "items") else self.blocks
        negatives = None if self.negative is None else len(as_list(self.negative))
        when = (self.start, self.end, self.curve)
        return self.adapter, len(as_list(self.images)), negatives, blocks, when, self.mask is None, self.combine

    def over_time(self) -> Callable[[float], float] | None:
        if (self.start, self.end, self.curve) == (0.0, 1.0, None):
            return None
        curve, end = self.curve or (lambda progress: 1.0), self.end if self.end < 1 else float("inf")
        return lambda progress: curve(progress) if self.start <= progress < end else 0.0


@dataclass(frozen=True)
class Item:
    """What one image is made from."""

    references: Sequence[Reference] = ()
    text: str = ""
    negative_text: str = ""
    seed: int = 0

    def form(self) -> Any:
        return tuple(reference.form() for reference in self.references)


@dataclass
class Prompter:
    """``models`` share one family; each has its own encoder, head and adapter, installed."""

    models: list[IPAdapterModel]
    defaults: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, adapter: str | Path | Sequence[str | Path], device: str | None = None, **options: Any) -> Self:
        """Adapter files onto the base of the first one; ``options`` are those of `ipa.export.loading.load_model`.

        ``device`` is by default a GPU if there is one. Raises UserError for adapters that do not fit the base.
        """
        first, *others = as_list(adapter)
        models = [load_model(Path(first), **options)]
        shared = {name: options[name] for name in ("encoder", "encoder_weights", "dtype") if name in options}
        models += [load_onto(models[0].family, Path(each), **shared) for each in others]
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls([model.to(device) for model in models])

    @property
    def family(self) -> Family:
        return self.models[0].family

    def pipeline(self, pipeline_class: Any = None, **parts: Any) -> Any:
        """A public diffusers pipeline around the base; call it inside ``prompted``."""
        return self.family.pipeline(pipeline_class, **parts)

    def __call__(
        self,
        images: Pictures | Reference | Sequence[Reference] = (),
        text: str = "",
        *,
        negative_text: str = "",
        seed: int | Sequence[int] = 0,
        guidance: float = 3.0,
        num_steps: int = 25,
        width: int | None = None,
        height: int | None = None,
        batch_size: int = 8,
        guidance_rescale: float = 0.0,
        pipeline: Any = None,
        arguments: dict[str, Any] | None = None,
        **reference: Any,
    ) -> list[Image.Image]:
        """One image per ``seed``; ``reference`` are the fields of `Reference`. For the rest see ``generate``."""
        references = images_to_references(images, reference)
        items = [Item(references, text, negative_text, each) for each in as_list(seed)]
        return self.generate(
            items,
            guidance=guidance,
            num_steps=num_steps,
            width=width,
            height=height,
            batch_size=batch_size,
            guidance_rescale=guidance_rescale,
            pipeline=pipeline,
            arguments=arguments,
        )

    @torch.no_grad()
    def generate(
        self,
        items: Sequence[Item],
        *,
        guidance: float = 3.0,
        num_steps: int = 25,
        width: int | None = None,
        height: int | None = None,
        batch_size: int = 8,
        guidance_rescale: float = 0.0,
        pipeline: Any = None,
        arguments: dict[str, Any] | None = None,
    ) -> list[Image.Image]:
        """One image per item, each from its own seed. Items of one form make a batch together.

        ``pipeline`` is a public pipeline from ``self.pipeline(…)``, by default text to image; ``arguments`` are further
        ones of its call (``image``, ``strength``, ``controlnet_conditioning_scale``).
        """
        edge = self.family.image_size_px
        size = self.family.check_size(width or edge, "width"), self.family.check_size(height or edge, "height")
        pipe = pipeline or self.pipeline()
        made: list[Image.Image] = []
        for _, group in groupby(items, Item.form):
            alike = list(group)
            for first in range(0, len(alike), batch_size):
                batch = alike[first : first + batch_size]
                with self.prompted(batch, size, guidance > 1) as prompts:
                    latents = pipe(
                        **prompts,
                        **noise_arguments(pipe, self.family, size, [item.seed for item in batch]),
                        **guidance_arguments(pipe, self.family, guidance, guidance_rescale),
                        **size_arguments(pipe, size),
                        num_inference_steps=num_steps,
                        output_type="latent",
                        **(arguments or {}),
                    ).images
                pixels = self.family.decode_latents(self.family.unpack(latents, latent_shape(self.family, size)))
                made += [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in to_uint8(pixels).cpu()]
        return made

    @contextmanager
    def prompted(
        self, items: Sequence[Item], size: tuple[int, int] | None = None, guided: bool = True
    ) -> Iterator[dict[str, Any]]:
        """While inside, pipelines of this base see the items' image prompts; yields the arguments to call them with.

        ``size`` is the width and height of the images; ``guided`` is whether the pipeline is called with guidance.
        All items must have one form. Raises UserError.
        """
        width, height = size or (self.family.image_size_px,) * 2
        size_B6 = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(items), -1)
        positive = self.family.encode_text([item.text for item in items], size_B6)
        negative = self.family.encode_text([item.negative_text for item in items], size_B6) if guided else None
        conditions = self.conditions(items, (width, height), guided)
        with ExitStack() as stack:
            texts: tuple[TextCondition, TextCondition | None] = positive, negative
            for model, own in zip(self.models, conditions, strict=True):
                texts = stack.enter_context(model.guided(*texts, own))
            yield self.family.prompt_arguments(*texts)

    def conditions(self, items: Sequence[Item], size: tuple[int, int], guided: bool) -> list[list[ImageCondition]]:
        """The image prompts of each adapter; row i of each belongs to item i."""
        found: list[list[ImageCondition]] = [[] for _ in self.models]
        for references in zip(*(item.references for item in items), strict=True):
            number = references[0].adapter
            if not 0 <= number < len(self.models):
                raise UserError(f"adapter={number}: there are {len(self.models)} adapters, numbered from 0")
            found[number] += self.condition(self.models[number], references, size, guided)
        return found

    def condition(
        self, model: IPAdapterModel, references: Sequence[Reference], size: tuple[int, int], guided: bool
    ) -> list[ImageCondition]:
        first = references[0]
        images = columns([encode(model, as_list(each.images), each.weights, each.combine) for each in references])
        negative = None
        if first.negative is not None:
            negative = columns([encode(model, as_list(each.negative), None, "concat") for each in references])
        if negative is not None and len(negative) != len(images):
            raise UserError(f"negative: give as many images as the prompt has ({len(images)})")
        masks = None
        if first.mask is not None:
            masks = torch.cat([read_mask(each.mask, size) for each in references]).to(model.device)
        scales = torch.tensor([each.scale for each in references]).view(-1, 1, 1).to(model.device)
        scale = first.scale if len({each.scale for each in references}) == 1 else scales
        plain = ImageCondition(images, negative, scale, None, masks, first.over_time())
        if first.blocks is None:
            return [plain]
        weights = read_blocks(first.blocks, self.family.blocks())
        return on_blocks(plain, weights, self.family, guided)


def on_blocks(plain: ImageCondition, weights: BlockWeights, family: Family, guided: bool) -> list[ImageCondition]:
    conditions = [replace(plain, hosts=hosts_of(weights.shown, family))]
    if weights.pushed:
        if not guided:
            raise UserError("this preset pushes away from what is not wanted, which needs guidance above 1")
        conditions.append(replace(plain, negative=None, hosts=hosts_of(weights.pushed, family), reversed=True))
    return conditions


def hosts_of(weights: dict[str, float], family: Family) -> dict[str, float]:
    return {host.name: weights.get(host.block, 0.0) for host in family.hosts()}


def images_to_references(images: Any, options: dict[str, Any]) -> list[Reference]:
    given = as_list(images)
    if any(isinstance(each, Reference) for each in given):
        if options:
            raise UserError(f"{', '.join(options)}: give them to Reference(…)")
        return given
    return [Reference(given, **options)] if given else []


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | range) else [value]


def encode(
    model: IPAdapterModel, images: Sequence[Picture], weights: Sequence[float] | None, combine: str
) -> list[Features]:
    """Features of one prompt's images after combining them; one row each."""
    features = [model.encode_reference(reference(model, each)[None]) for each in images]
    if weights is not None:
        features = [each.map(partial(torch.mul, float(w))) for each, w in zip(features, weights, strict=True)]
    merged: dict[str, list[Tensor]] = {}
    for name in ("pooled_BE", "patches_BPF"):
        tensors = [value for each in features if (value := getattr(each, name)) is not None]
        if tensors:
            merged[name] = COMBINE[combine](tensors)
    return [Features(**dict(zip(merged, values, strict=True))) for values in zip(*merged.values(), strict=True)]


def reference(model: IPAdapterModel, picture: Picture) -> Tensor:
    return fit_reference(open_reference(picture), model.encoder.image_size_px, model.reference_fit).to(model.device)


def open_reference(picture: Picture) -> Opened:
    if not isinstance(picture, Image.Image):
        return read_picture(Path(picture))
    png = io.BytesIO()
    picture.save(png, "PNG")
    return open_picture(png.getvalue(), "white", picture.width * picture.height)


def columns(rows: Sequence[list[Features]]) -> list[Features]:
    """Per item its images → per image its items."""

    def stacked(each: Sequence[Features], name: str) -> Tensor | None:
        tensors = [value for one in each if (value := getattr(one, name)) is not None]
        return torch.cat(tensors) if tensors else None

    pairs = zip(*rows, strict=True)
    return [Features(stacked(each, "pooled_BE"), stacked(each, "patches_BPF")) for each in pairs]


def read_mask(mask: Any, size: tuple[int, int]) -> Tensor:
    """mask_1HW in {0, 1} at the images' size, as diffusers prepares it; raises UserError for other proportions."""
    picture = mask if isinstance(mask, Image.Image) else Image.open(mask)
    width, height = size
    if abs(picture.width * height - picture.height * width) > max(width, height):
        raise UserError(f"mask of {picture.width} × {picture.height} px: the images have {width} × {height}")
    return IPAdapterMaskProcessor().preprocess([picture.convert("L")], height=height, width=width)[0]


def latent_shape(family: Family, size: tuple[int, int]) -> tuple[int, int, int]:
    """C, H, W of the latents of an image of this width and height."""
    edge = family.image_size_px
    channels, height, width = family.latent_shape(edge)
    return channels, height * size[1] // edge, width * size[0] // edge


def noise_arguments(pipeline: Any, family: Family, size: tuple[int, int], seeds: Sequence[int]) -> dict[str, Any]:
    """A generator for each image, and its noise as latents where the pipeline takes them."""
    generators = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
    if "latents" not in inspect.signature(pipeline.__call__).parameters:
        return generators
    noise = family.pack(draw_noise(latent_shape(family, size), seeds))
    return generators | {"latents": noise.to(family.device, family.dtype)}


def guidance_arguments(pipeline: Any, family: Family, guidance: float, rescale: float) -> dict[str, Any]:
    """Raises UserError for a rescaling that this pipeline does not know."""
    arguments = family.guidance_arguments(guidance, rescale)
    unknown = arguments.keys() - inspect.signature(pipeline.__call__).parameters.keys()
    if rescale and unknown:
        raise UserError(f"guidance_rescale={rescale}: {type(pipeline).__name__} has none, give 0")
    return {name: value for name, value in arguments.items() if name not in unknown}


def size_arguments(pipeline: Any, size: tuple[int, int]) -> dict[str, int]:
    """Width and height where the pipeline does not take them from its image."""
    known = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in zip(("width", "height"), size, strict=True) if name in known}
