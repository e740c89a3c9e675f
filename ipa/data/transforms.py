"""Picture bytes → uint8 tensors: upright, without transparency, RGB, square.

The target and the reference are cut from the same composed picture. ``square`` does what torchvision's
``Resize(size, BICUBIC)`` and ``CenterCrop(size)`` do on a PIL picture, which is also CLIP's preprocessing before it
normalises, but only computes the pixels that are kept.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from ipa.data.addresses import Address
from ipa.data.draws import uniform
from ipa.data.rejects import BROKEN_PICTURE, TOO_MANY_PIXELS, Rejected


@dataclass(frozen=True)
class Background:
    """What transparent pictures are laid on: white with probability ``white``, else one of ``colours`` at random.

    Colours are written as PIL reads them (``#3b6fd4``, ``teal``). Opaque pictures are left alone.
    """

    colours: Sequence[str] = ()
    white: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.white <= 1:
            raise ValueError(f"background.white is a probability, not {self.white}")
        if self.white < 1 and not self.colours:
            raise ValueError(f"background.white is {self.white}: give background.colours for the rest, or white=1")
        for colour in self.colours:
            ImageColor.getrgb(colour)
        object.__setattr__(self, "colours", tuple(self.colours))  # not a view into a whole configuration

    def colour(self, address: Address) -> str:
        if uniform(address, "background") < self.white:
            return "white"
        return self.colours[int(uniform(address, "background colour") * len(self.colours))]


def open_picture(data: bytes, background: str, max_pixels: int) -> Image.Image:
    """Decode the first frame to an upright RGB picture; raises ``Rejected``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of odd metadata and of sizes that max_pixels decides on
            picture = Image.open(io.BytesIO(data))
            if picture.width * picture.height > max_pixels:
                raise Rejected(TOO_MANY_PIXELS, f"{picture.width} x {picture.height}")
            if min(picture.size) < 1:
                raise Rejected(BROKEN_PICTURE, "it has no pixels")
            return flatten(ImageOps.exif_transpose(picture), background)
    except Image.DecompressionBombError as error:
        raise Rejected(TOO_MANY_PIXELS, str(error)) from error
    except Rejected:
        raise
    except Exception as error:  # a decoder on damaged bytes raises nearly anything
        raise Rejected(BROKEN_PICTURE, repr(error)) from error


def read_picture(path: Path, option: str = "image") -> Image.Image:
    """An upright RGB picture from a file, transparency on white; raises FileNotFoundError or ValueError.

    The messages name the file and the ``option`` that gave it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option}={path}: no such file")
    try:
        return open_picture(path.read_bytes(), background="white", max_pixels=100_000_000)
    except Rejected as error:
        raise ValueError(f"{option}={path} cannot be read as a picture: {error}") from error


def flatten(picture: Image.Image, background: str) -> Image.Image:
    """RGB, with transparency laid on ``background``."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    canvas = Image.new("RGBA", picture.size, background)
    canvas.alpha_composite(picture.convert("RGBA"))
    return canvas.convert("RGB")


def cut_corner(size: tuple[int, int], size_px: int) -> tuple[int, int]:
    """Left and top, in pixels of the resized picture, of the square that ``square`` keeps of one of this size."""
    left, top = (round((int(size_px * side / min(size)) - size_px) / 2) for side in size)
    return left, top


def square(picture: Image.Image, size_px: int) -> Image.Image:
    """Shortest side to ``size_px`` (bicubic with antialias), then the centre.

    Very tall pictures may differ from the full resize by rounding: PIL chooses the order of its two passes by shape.
    """
    short_px = min(picture.size)
    resized = [int(size_px * side / short_px) for side in picture.size]
    scales = [side / new for side, new in zip(picture.size, resized, strict=True)]
    starts = cut_corner(picture.size, size_px)
    corner = [start * scale for start, scale in zip(starts, scales, strict=True)]
    # rounding may put the far corner a hair outside, which PIL refuses
    far = [min(side, c + size_px * scale) for side, c, scale in zip(picture.size, corner, scales, strict=True)]
    box = (corner[0], corner[1], far[0], far[1])
    return picture.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box)


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture → uint8 image_3HW."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
