"""Optional augmentation of the reference only, so that the adapter cannot learn to copy the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ipa.data.addresses import Address
from ipa.data.images.opening import Size
from ipa.data.images.transforms import Opened, covering

MAX_STRETCH = math.log(4 / 3)  # of a crop's aspect ratio relative to the picture's


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flip and colour jitter; the defaults change nothing.

    The crop has at least the fraction ``area`` of the picture's area and about its aspect ratio; ``flip`` is the
    probability of a horizontal flip. Brightness, contrast and saturation are multiplied by 1 ± the given number.
    """

    area: float = 1.0
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def need(self, size_px: int) -> Size:
        """What ``open_picture`` needs to know, so that the smallest crop has enough pixels for this edge."""
        side_px = math.ceil(size_px / math.sqrt(self.area) * math.exp(stretch_room(self.area)))
        return side_px, side_px

    def crop(self, picture: Opened, need: Size, address: Address) -> Opened:
        """A random part of the picture, large enough for ``need``."""
        if self.area == 1:
            return picture
        picture = picture.version_for(covering(picture.size, need))
        share = self.area + (1 - self.area) * address.uniform("reference crop area")
        stretch = stretch_room(share) * (2 * address.uniform("reference crop shape") - 1)
        whole = [int(side) for side in picture.span]
        shares = [math.sqrt(share) * math.exp(s) for s in (stretch, -stretch)]
        width, height = (max(1, round(side * part)) for side, part in zip(whole, shares, strict=True))
        left = round(address.uniform("reference crop x") * (whole[0] - width))
        top = round(address.uniform("reference crop y") * (whole[1] - height))
        pixels_3HW = picture.pixels_3HW[:, top : top + height, left : left + width]
        return Opened(pixels_3HW, (width, height), (width, height))

    def change(self, reference_3HW: Tensor, address: Address) -> Tensor:
        if self.flip and address.uniform("reference flip") < self.flip:
            reference_3HW = reference_3HW.flip(-1)
        for name in ("brightness", "contrast", "saturation"):
            if most := getattr(self, name):
                from torchvision.transforms import functional  # type: ignore[import-untyped]  # slow to import

                factor = 1 + most * (2 * address.uniform(f"reference {name}") - 1)
                reference_3HW = getattr(functional, f"adjust_{name}")(reference_3HW, factor)
        return reference_3HW


def stretch_room(share: float) -> float:
    """How much (in logarithms) the sides of a crop with this share of the area may be stretched."""
    return min(MAX_STRETCH, -math.log(share)) / 2
