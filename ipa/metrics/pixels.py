"""Pictures on their way into a scoring network: fitted to a square, one by one where their sizes differ."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ipa.types import to_uint8

# pixels in [-1, 1]: B3HW, or 3HW each of its own size
Pictures = Tensor | Sequence[Tensor]


def in_pieces(pictures: Pictures, batch_size: int) -> Iterator[Pictures]:
    """At most ``batch_size`` pictures at a time."""
    for start in range(0, len(pictures), batch_size):
        yield pictures[start : start + batch_size]


def on_each_size(function: Callable[[Tensor], Tensor], pictures: Pictures) -> Tensor:
    """``function`` over pixels_B3HW: of all pictures at once, or of each where they come as a list."""
    if isinstance(pictures, Tensor):
        return function(pictures)
    return torch.cat([function(picture_3HW[None]) for picture_3HW in pictures])


def fit_square(pixels_B3HW: Tensor, size_px: int, crop_px: int | None = None) -> Tensor:
    """Shortest side to ``size_px``, bicubic with antialias, then the centre, ``crop_px`` wide (None: ``size_px``)."""
    crop_px = crop_px or size_px
    height, width = pixels_B3HW.shape[-2:]
    factor = size_px / min(height, width)
    sides = (max(size_px, round(height * factor)), max(size_px, round(width * factor)))
    if sides != (height, width):
        pixels_B3HW = F.interpolate(pixels_B3HW, sides, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (sides[0] - crop_px) // 2, (sides[1] - crop_px) // 2
    return pixels_B3HW if sides == (crop_px, crop_px) else pixels_B3HW[..., top : top + crop_px, left : left + crop_px]


def picture_keys(pictures: Pictures) -> Tensor:
    """A number for each picture's pixels in 256 levels: key_B (int64), equal for equal pictures, hardly otherwise."""
    return torch.tensor([picture_key(picture_3HW) for picture_3HW in pictures])


def picture_key(picture_3HW: Tensor) -> int:
    levels = to_uint8(picture_3HW).cpu().contiguous()
    digest = hashlib.blake2b(levels.numpy().tobytes(), digest_size=8, salt=str(tuple(levels.shape[1:])).encode()[:16])
    return int.from_bytes(digest.digest(), signed=True)
