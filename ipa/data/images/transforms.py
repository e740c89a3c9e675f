"""Encoded pictures → uint8 tensors: upright, opaque, RGB, cropped and resized.

    picture = open_picture(data, "white", max_pixels=100_000_000, needs=[(512, 512), (224, 224)]).shrunk((512, 512))
    image_3HW, reference_3HW = cover(picture, (512, 512)), fit_reference(picture, 224)

Sizes are (width, height) in pixels. Every resize is bicubic with antialias and equals torchvision's ``Resize(BICUBIC)``
of a PIL picture to one level of 255 (more where an overshoot is clipped: PIL makes its two passes in the other order).
The fit ``crop`` is CLIP's preprocessing before normalisation.

To save time a picture may be resized from a smaller version of itself that is still ``HEADROOM`` times as large:
libjpeg's decoding at 1/2, 1/4 or 1/8, or the resized whole that the target is cropped from; docs/data.md has what that
costs in dB. Without headroom (1, the training's default) the decoder drops the high half of each block's frequencies,
part of which a bicubic filter keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from ipa.data.addresses import Address
from ipa.data.images.opening import Size, covers, decode_open, decode_picture
from ipa.data.rejects import Rejected
from ipa.errors import UserError

HEADROOM = 2
MAX_EXCESS = 4  # resized whole only up to this many times the pixels that are kept; else just the crop is computed
PAD_COLOUR = "#7a7468"


@dataclass(frozen=True)
class Background:
    """What transparent pictures are composited on: white with probability ``white``, else one of ``colours``.

    Colours are written as PIL reads them (``#3b6fd4``, ``teal``). Opaque pictures do not change.
    """

    colours: Sequence[str] = ()
    white: float = 1.0

    def __post_init__(self) -> None:
        if self.white < 1 and not self.colours:
            raise UserError(f"background.white is {self.white}: give background.colours for the rest, or white=1")
        try:
            for colour in self.colours:
                ImageColor.getrgb(colour)
        except (TypeError, AttributeError, ValueError) as error:
            raise UserError(f"data.background.colours={self.colours}: give a list of '#rrggbb' or names") from error
        object.__setattr__(self, "colours", tuple(self.colours))  # not a view into a whole configuration

    def colour(self, address: Address, draw: str = "background") -> str:
        if self.white == 1 or address.uniform(draw) < self.white:
            return "white"
        return self.colours[int(address.uniform(f"{draw} colour") * len(self.colours))]


@dataclass(frozen=True)
class Opened:
    """A whole picture, upright and RGB, at the size that it was decoded or resized to.

    ``size`` is the original's. The picture fills ``span`` of the pixels: the last of 1001 px decoded at 1/2 is half
    empty. ``larger`` is the version that this one was made from.
    """

    pixels_3HW: Tensor
    size: Size
    span: tuple[float, float]
    larger: Opened | None = None

    @classmethod
    def of(cls, picture: Image.Image, size: Size | None = None, span: tuple[float, float] | None = None) -> Opened:
        return cls(view(picture), size or picture.size, span or picture.size)

    def version_for(self, whole: Size) -> Opened:
        """The smallest version that gives a good picture of this size, or the largest one."""
        enough = self.is_at(whole) or covers(self.span, whole, HEADROOM)
        return self if enough or self.larger is None else self.larger

    def is_at(self, whole: Size) -> bool:
        return self.span[0] == whole[0] and self.span[1] == whole[1]

    def resized(self, whole: Size) -> Tensor:
        source = self.version_for(whole)
        if source.is_at(whole):
            return source.pixels_3HW
        # a size would include half empty pixels, so factors are given; the millionth makes up for their rounding
        factors = [(new + 1e-6) / old for new, old in zip(whole, source.span, strict=True)]
        pixels = F.interpolate(source.pixels_3HW[None], scale_factor=factors[::-1], mode="bicubic", antialias=True)
        return pixels[0, :, : whole[1], : whole[0]]

    def shrunk(self, size: Size) -> Opened:
        """As small as ``cover`` needs it for this size, so that a target and a reference share the resize."""
        whole = covering(self.size, size)
        if is_long(whole, size) or not covers(self.span, whole):
            return self
        return Opened(self.resized(whole), self.size, whole, self.larger or self)


def open_picture(
    data: bytes, background: str, max_pixels: int, needs: Sequence[Size] = (), headroom: float = HEADROOM
) -> Opened:
    """Decode the first frame; raises ``Rejected``.

    ``needs`` are all sizes that it will be resized to: a much larger JPEG is not decoded in full, but at least
    ``headroom`` times as large as they are.
    """
    return Opened.of(*decode_picture(data, background, max_pixels, needs, headroom))


def read_picture(path: Path, option: str = "image", background: str = "white") -> Opened:
    """A picture from a file; raises UserError, which names the file and its ``option``."""
    if not path.is_file():
        raise UserError(f"{option}={path}: no such file")
    try:
        return open_picture(path.read_bytes(), background, max_pixels=100_000_000)
    except Rejected as error:
        raise UserError(f"{option}={path} cannot be read as a picture: {error}") from error


def from_pil(picture: Image.Image, option: str = "image", background: str = "white") -> Opened:
    """``read_picture`` of a picture that is open already."""
    try:
        return Opened.of(*decode_open(picture, background))
    except Rejected as error:
        raise UserError(f"{option}={picture} cannot be read as a picture: {error}") from error


def covering(size: Size, target: Size) -> Size:
    """The smallest size of these proportions that covers ``target``; rounded down as torchvision's ``Resize`` does."""
    (width, height), (target_width, target_height) = size, target
    if width * target_height <= height * target_width:
        return target_width, target_width * height // width
    return target_height * width // height, target_height


def is_long(whole: Size, size: Size) -> bool:
    return whole[0] * whole[1] > MAX_EXCESS * size[0] * size[1]


def cut_corner(before: Size, size: Size, place: tuple[float, float] = (0.5, 0.5)) -> tuple[int, int]:
    """Left and top of ``cover``'s crop, in pixels of the resized picture, whose original size is ``before``."""
    left, top = (
        round((whole - kept) * share) for whole, kept, share in zip(covering(before, size), size, place, strict=True)
    )
    return left, top


def cover(picture: Opened, size: Size, place: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """uint8 image_3HW: resized to the smallest size that covers ``size``, then cropped.

    ``place`` is the crop's position, in fractions of the margin: (0, 0) is the upper left, (0.5, 0.5) the centre.
    """
    whole, (left, top) = covering(picture.size, size), cut_corner(picture.size, size, place)
    if is_long(whole, size):
        return cut_part(picture.version_for(whole), whole, (left, top), size)
    return picture.resized(whole)[:, top : top + size[1], left : left + size[0]].contiguous()


def cut_part(picture: Opened, whole: Size, corner: tuple[int, int], size: Size) -> Tensor:
    """``cover`` for long pictures: computes the crop only. PIL does it, which is slower per pixel."""
    pixels = Image.fromarray(picture.pixels_3HW.permute(1, 2, 0).numpy())
    box = crop_box(picture.span, whole, corner, size)
    return to_tensor(pixels.resize(size, Image.Resampling.BICUBIC, box=box))


def crop_box(
    span: tuple[float, float], whole: Size, corner: tuple[int, int], size: Size
) -> tuple[float, float, float, float]:
    """The crop's corners before its picture, which filled ``span``, was resized to ``whole``."""
    scales = [old / new for old, new in zip(span, whole, strict=True)]
    near = [start * scale for start, scale in zip(corner, scales, strict=True)]
    # rounding may put the far corner just outside, which PIL refuses
    far = [min(old, n + s * scale) for old, n, s, scale in zip(span, near, size, scales, strict=True)]
    return near[0], near[1], far[0], far[1]


def pad_square(picture: Opened, size_px: int) -> Tensor:
    long_px = max(picture.size)
    width, height = (max(1, size_px * side // long_px) for side in picture.size)
    left, top = (size_px - width) // 2, (size_px - height) // 2
    colour = torch.tensor(ImageColor.getrgb(PAD_COLOUR), dtype=torch.uint8)
    canvas_3HW = colour[:, None, None].repeat(1, size_px, size_px)
    canvas_3HW[:, top : top + height, left : left + width] = picture.resized((width, height))
    return canvas_3HW


class Fit(NamedTuple):
    """A way to make a square; ``words`` describe it in an adapter file's metadata."""

    words: str
    make: Callable[[Opened, int], Tensor]


# Pads have CLIP's mean colour, as in LLaVA: 0 after CLIP's normalisation.
FITS = {
    "crop": Fit("shortest side bicubic, centre crop", lambda picture, size_px: cover(picture, (size_px, size_px))),
    "pad": Fit(f"longest side bicubic, padded with {PAD_COLOUR}", pad_square),
    "squash": Fit("both sides bicubic, proportions lost", lambda picture, px: picture.resized((px, px)).contiguous()),
}


def fit_named(name: str) -> Fit:
    """Raises UserError for a name that is not in ``FITS``."""
    if name not in FITS:
        raise UserError(f"data.reference_fit={name}: one of {', '.join(FITS)}")
    return FITS[name]


def fit_reference(picture: Opened, size_px: int, fit: str = "crop") -> Tensor:
    """uint8 reference_3HW, a square of the encoder's edge; see ``FITS``."""
    return fit_named(fit).make(picture, size_px)


def view(picture: Image.Image) -> Tensor:
    """RGB picture → uint8 pixels_3HW in channels-last memory, which torch resizes fastest."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_tensor(picture: Image.Image) -> Tensor:
    return view(picture).contiguous()
