"""Pixels for the scoring networks: fitted to a square, one by one if their sizes differ."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ipa.types import to_uint8

# pixels in [-1, 1]: B3HW, or 3HW each of its own size
Images = Tensor | Sequence[Tensor]


def on_each_size(function: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    """Apply ``function`` to pixels_B3HW: to a tensor at once, to a list image by image."""
    if isinstance(images, Tensor):
        return function(images)
    return torch.cat([function(image_3HW[None]) for image_3HW in images])


def fit_square(pixels_B3HW: Tensor, size_px: int, crop_px: int | None = None) -> Tensor:
    """Resize the shortest side to ``size_px`` (bicubic, antialias), then crop the centre to ``crop_px``, if given."""
    crop_px = crop_px or size_px
    height, width = pixels_B3HW.shape[-2:]
    factor = size_px / min(height, width)
    sides = (max(size_px, round(height * factor)), max(size_px, round(width * factor)))
    if sides != (height, width):
        pixels_B3HW = F.interpolate(pixels_B3HW, sides, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (sides[0] - crop_px) // 2, (sides[1] - crop_px) // 2
    return pixels_B3HW if sides == (crop_px, crop_px) else pixels_B3HW[..., top : top + crop_px, left : left + crop_px]


def image_keys(images: Images) -> Tensor:
    """Hash of each image's pixels in 256 levels: key_B (int64)."""
    return torch.tensor([image_key(image_3HW) for image_3HW in images])


def image_key(image_3HW: Tensor) -> int:
    levels = to_uint8(image_3HW).cpu().contiguous()
    digest = hashlib.blake2b(levels.numpy().tobytes(), digest_size=8, salt=str(tuple(levels.shape[1:])).encode()[:16])
    return int.from_bytes(digest.digest(), signed=True)
