"""Masks that belong to pictures: what of a target counts in the loss, and what of a reference is seen.

A mask is a picture of the same size, white inside. It moves with its picture through buckets and crops.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from ipa.data.images.opening import Size, flatten, upright, upright_size, with_picture
from ipa.data.images.transforms import PAD_COLOUR, Opened, covering, crop_box, cut_corner
from ipa.data.records import Mask
from ipa.data.rejects import Reason, Rejected


def open_mask(mask: Mask, picture: Size, max_pixels: int) -> Image.Image:
    """Grey, of the ``picture``'s size; what is transparent is black. Raises ``Rejected``."""

    def read(opened: Image.Image) -> Image.Image:
        check_size(upright_size(opened), picture, max_pixels)
        if not mask.is_alpha:
            return flatten(upright(opened), "black").convert("L")
        return upright(opened).getchannel("A") if opened.has_transparency_data else Image.new("L", picture, "white")

    return with_picture(mask.data, read)


def check_size(size: Size, picture: Size, max_pixels: int) -> None:
    width, height = picture
    if size != picture:
        raise Rejected(Reason.WRONG_MASK, f"the mask has {size[0]} x {size[1]} px, the picture {width} x {height}")
    if width * height > max_pixels:
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{width} x {height}, more than data.max_pixels={max_pixels}")


def cover_mask(mask: Image.Image, target: Size, place: tuple[float, float], cells: Size) -> Tensor:
    """uint8 mask_1HW of the ``cells`` of a target's latents: their area's mean, after the crop of ``cover``."""
    whole = covering(mask.size, target)
    box = crop_box(mask.size, whole, cut_corner(mask.size, target, place), target)
    return torch.from_numpy(np.array(mask.resize(cells, Image.Resampling.BOX, box=box)))[None]


def masked(picture: Opened, mask: Image.Image, colour: str = PAD_COLOUR) -> Opened:
    """The picture, in its largest version, where the mask is white, and a colour where it is black.

    The default is 0 after CLIP's normalisation, so the encoder reads the product of pixels and mask.
    """
    source = picture.larger or picture
    height, width = source.pixels_3HW.shape[1:]
    share_1HW = torch.from_numpy(np.array(mask.resize((width, height), Image.Resampling.BOX)))[None] / 255
    colour_311 = torch.tensor(ImageColor.getrgb(colour)[:3], dtype=torch.float32)[:, None, None]
    pixels_3HW = colour_311 + share_1HW * (source.pixels_3HW - colour_311)
    return Opened(pixels_3HW.round().to(torch.uint8), source.size, source.span)
