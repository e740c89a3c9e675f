"""Image prompts in use: their images and how each of them acts; their features and masks for a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from ipa.data.images.transforms import Opened, fit_reference, from_pil, read_picture
from ipa.errors import UserError
from ipa.model import IPAdapterModel
from ipa.presets import SCALINGS
from ipa.types import Features

Picture = str | Path | Image.Image
Pictures = Picture | Sequence[Picture]

# functions of the features of N images, before the head and after their weights; None concatenates the tokens instead
COMBINE: dict[str, Callable[[list[Tensor]], Tensor] | None] = {
    "concat": None,
    "add": lambda each: torch.stack(each).sum(0),
    "average": lambda each: torch.stack(each).mean(0),
    "subtract": lambda each: each[0] - torch.stack(each[1:]).mean(0),
    "norm average": lambda each: torch.stack([x / x.norm(dim=-1, keepdim=True) for x in each]).mean(0),
    "max": lambda each: torch.stack(each).amax(0),
    "min": lambda each: torch.stack(each).amin(0),
}
TILE_PX, MAX_TILES = 256, 4
SQUARE = (0.75, 1.33)  # height / width of images that are tiled as squares


@dataclass(frozen=True)
class Reference:
    """One image prompt: its images, and how they act.

    ``scale`` is λ. ``blocks`` is a preset's name or a mapping of blocks to factors of λ (`ipa.presets`). The prompt
    acts from ``start`` to ``end``, fractions of the training's noise schedule; ``curve`` is a factor of λ as a function
    of the progress in between. ``mask`` is white where it acts. ``combine``, one of ``COMBINE``, merges several images
    into one prompt; ``weights`` multiply their features. ``negative`` images replace "no image" in guidance's negative
    part. ``adapter`` is the adapter's number.

    ``embeds_scaling``, one of `ipa.presets.SCALINGS`, says where λ enters: it multiplies the attention's result
    (``V only``) or acts inside the softmax. ``subtract_text`` names content to remove from the image's embedding,
    e ← e − s · e_text with s = ``subtract_strength`` (InstantStyle, Wang et al. 2024); for adapters that read the
    pooled embedding of an encoder with a text tower. ``tiles`` divides the image (see ``tiles_of``); each tile becomes
    a prompt that acts in its own rectangle.
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
    embeds_scaling: str = "V only"
    subtract_text: str = ""
    subtract_strength: float = 1.0
    tiles: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for impossible values."""
        self.check_types()
        count = len(as_list(self.images))
        if not (self.scale >= 0 and self.scale < float("inf")):
            raise UserError(f"scale={self.scale}: λ is a number of at least 0")
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(f"start={self.start} end={self.end}: give 0 ≤ start ≤ end ≤ 1")
        if self.combine not in list(COMBINE):
            raise UserError(f"combine={self.combine}: give one of {', '.join(COMBINE)}")
        if count == 0 or (count == 1 and self.combine == "subtract"):
            raise UserError(f"combine={self.combine} needs {'two images' if count else 'an image'} or more")
        if self.weights is not None and len(self.weights) != count:
            raise UserError(f"weights={self.weights}: give one for each of the {count} images")
        if self.embeds_scaling not in SCALINGS:
            raise UserError(f"embeds_scaling={self.embeds_scaling}: give one of {', '.join(SCALINGS)}")
        if self.tiles and count > 1:
            raise UserError(f"tiles: give one image for each prompt, not {count}")

    def check_types(self) -> None:
        pictures = [*as_list(self.images), *([] if self.negative is None else as_list(self.negative))]
        for each in [*pictures, *([] if self.mask is None else [self.mask])]:
            if not isinstance(each, str | Path | Image.Image):
                raise UserError(f"{each!r} is no picture: images, negative and mask are files or PIL images")
        for name in ("scale", "start", "end", "adapter", "subtract_strength"):
            if not isinstance(getattr(self, name), Real):
                raise UserError(f"{name}={getattr(self, name)}: give a number")
        if not isfinite(self.subtract_strength):
            raise UserError(f"subtract_strength={self.subtract_strength}: give a finite number")
        if not isinstance(self.subtract_text, str | None):
            raise UserError(f"subtract_text={self.subtract_text}: give a text")
        weights: Any = () if self.weights is None else self.weights
        if not isinstance(weights, Iterable) or not all(isinstance(w, Real) and isfinite(w) for w in weights):
            raise UserError(f"weights={self.weights}: give a number for each image")
        if not (self.curve is None or callable(self.curve)):
            raise UserError(f"curve={self.curve}: it is a function, and cannot be given outside of Python")

    def form(self) -> Any:
        """Prompts of the same form can share a batch; their images, masks and λ may differ."""
        blocks = tuple(self.blocks.items()) if hasattr(self.blocks, "items") else self.blocks
        negatives = None if self.negative is None else len(as_list(self.negative))
        when = (self.start, self.end, self.curve)
        none = self.scale == 0  # the same for a whole batch, since a simple adapter then has no tokens
        how = (self.combine, self.embeds_scaling, self.subtract_text, self.subtract_strength, none)
        return self.adapter, len(as_list(self.images)), negatives, blocks, when, self.mask is None, how

    def tiled(self, size: tuple[int, int]) -> list[Reference]:
        """A prompt for each tile, with its rectangle as mask; ``size`` is the width and height of the images."""
        if not self.tiles:
            return [self]
        own = None if self.mask is None else Image.fromarray((read_mask(self.mask, size)[0] * 255).byte().numpy())
        found = []
        for tile, box in tiles_of(open_image(as_list(self.images)[0], "image")):
            mask = Image.new("L", size)
            left, top, right, bottom = (round(part * edge) for part, edge in zip(box, size * 2, strict=True))
            mask.paste(255, (left, top, right, bottom))
            region = mask if own is None else ImageChops.multiply(mask, own)
            found.append(replace(self, images=tile, mask=region, tiles=False))
        return found

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

    def tiled(self, size: tuple[int, int]) -> Item:
        return replace(self, references=[part for each in self.references for part in each.tiled(size)])


def tiles_of(picture: Image.Image) -> list[tuple[Image.Image, tuple[float, float, float, float]]]:
    """Tiles of 256 px, each with its left, top, right and bottom as fractions of the image, as ComfyUI_IPAdapter_plus.

    A nearly square image is cropped to a square of 2 × 2 tiles. A longer one gives up to four in a row, which overlap
    evenly; an image longer than four squares is cropped to its middle.
    """
    width, height = tiled_size(picture.height / picture.width)
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    boxes = [(x, y, x + TILE_PX, y + TILE_PX) for y in tile_starts(height) for x in tile_starts(width)]
    return [(fitted.crop(box), (box[0] / width, box[1] / height, box[2] / width, box[3] / height)) for box in boxes]


def tiled_size(ratio: float) -> tuple[int, int]:
    """Width and height for an image of this height / width."""
    if SQUARE[0] < ratio < SQUARE[1]:
        return 2 * TILE_PX, 2 * TILE_PX
    long = min(round(TILE_PX * max(ratio, 1 / ratio)), MAX_TILES * TILE_PX)
    return (TILE_PX, long) if ratio > 1 else (long, TILE_PX)


def tile_starts(edge: int) -> list[int]:
    """First pixels of the fewest tiles that cover an edge."""
    count = -(-edge // TILE_PX)
    return [round(number * (edge - TILE_PX) / max(count - 1, 1)) for number in range(count)]


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
    model: IPAdapterModel,
    images: Sequence[Picture],
    weights: Sequence[float] | None = None,
    combine: str = "concat",
    without: Tensor | None = None,
) -> list[Features]:
    """Features of one prompt's images after combining them, one row each; ``without`` is first subtracted from each."""
    features = [model.encode_reference(reference(model, each)[None]) for each in images]
    if without is not None:
        features = [each.map(lambda embedding: embedding - without) for each in features]
    if weights is not None:
        features = [each.map(partial(torch.mul, float(w))) for each, w in zip(features, weights, strict=True)]
    function = COMBINE[combine]
    return features if function is None else [Features.join(function, features)]


def content_of(model: IPAdapterModel, prompt: Reference) -> Tensor | None:
    """s · e_text of ``subtract_text``: embedding_1E. Raises UserError where the head does not read embeddings."""
    if not prompt.subtract_text:
        return None
    if model.head.uses != "pooled":
        raise UserError(
            f"subtract_text={prompt.subtract_text}: texts cannot be subtracted from the {model.head.uses} that this "
            "adapter reads: use an adapter with global tokens"
        )
    return prompt.subtract_strength * model.encoder.embed_text(prompt.subtract_text)


def reference(model: IPAdapterModel, picture: Picture) -> Tensor:
    return fit_reference(open_reference(picture), model.encoder.image_size_px, model.reference_fit).to(model.device)


def open_reference(picture: Picture, option: str = "image", background: str = "white") -> Opened:
    if isinstance(picture, Image.Image):
        return from_pil(picture, option, background)
    return read_picture(Path(picture), option, background)


def open_image(picture: Picture, option: str, background: str = "white") -> Image.Image:
    """Upright, in sRGB and composited, as image prompts are read; raises UserError naming ``option``."""
    return Image.fromarray(open_reference(picture, option, background).pixels_3HW.permute(1, 2, 0).numpy())


def columns(rows: Sequence[list[Features]]) -> list[Features]:
    """For each item its images → for each image its items."""
    return [Features.join(torch.cat, each) for each in zip(*rows, strict=True)]


def read_mask(mask: Picture, size: tuple[int, int]) -> Tensor:
    """mask_1HW in {0, 1} at the images' size, as diffusers prepares it; transparent pixels are 0.

    Raises UserError for other proportions, and for an image that cannot be read.
    """
    picture = open_image(mask, "mask", "black")
    width, height = size
    if abs(picture.width * height - picture.height * width) > max(width, height):
        raise UserError(f"mask of {picture.width} × {picture.height} px: the images have {width} × {height}")
    return IPAdapterMaskProcessor().preprocess([picture.convert("L")], height=height, width=width)[0]


def regions(items: Sequence[Item], size: tuple[int, int]) -> Tensor:
    """Where the prompts of each item act, region_B1HW in {0, 1}: everywhere if one of them has no mask."""
    everywhere = torch.ones(1, size[1], size[0])
    found = []
    for item in items:
        masks = [everywhere if each.mask is None else read_mask(each.mask, size) for each in item.references]
        found.append(torch.stack(masks).amax(0) if masks else 0 * everywhere)
    return torch.stack(found)
