"""Border colour: mean CIE Lab distance (ΔE 1976) between the border colours of image and prompt; lower is better."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ipa.metrics.image_metric import Images, ItemMetric, on_each_size

# linear sRGB → CIE XYZ (IEC 61966-2-1); the rows add up to the white point D65
RGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


class BorderColour(ItemMetric):
    """border_lab: whether the plain background of an image has the colour of the prompt's. Needs no network."""

    def __init__(self, width: float = 1 / 16, **kwargs: Any) -> None:
        super().__init__(["border_lab"], {"border_lab": False}, **kwargs)
        self.width = width

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        return {"border_lab": border_distance(generated, references, self.width)}


def border_distance(generated: Images, prompts: Images, width: float = 1 / 16) -> Tensor:
    """ΔE between the median border colours of each pair: distance_B. ``width`` is a fraction of the edge."""
    one_B3, other_B3 = (on_each_size(lambda pixels: border_lab(pixels, width), each) for each in (generated, prompts))
    return (one_B3 - other_B3).square().sum(1).sqrt().float()


def border_lab(pixels_B3HW: Tensor, width: float) -> Tensor:
    """Median colour of the frame around each image, in CIE Lab (D65): lab_B3, float64 on the CPU."""
    edge = max(1, round(width * pixels_B3HW.shape[-1]))
    inside = torch.zeros(pixels_B3HW.shape[-2:], dtype=torch.bool, device=pixels_B3HW.device)
    inside[edge:-edge, edge:-edge] = True
    # float32 powers depend on the number of rows by more than the metrics' tolerance
    median_B3 = pixels_B3HW.float()[..., ~inside].median(-1).values.cpu().double()
    return rgb_to_lab(((median_B3 + 1) / 2).clamp(0, 1))


def rgb_to_lab(rgb_B3: Tensor) -> Tensor:
    """sRGB in [0, 1] → CIE Lab (D65): L in [0, 100], a and b about ± 100."""
    linear_B3 = torch.where(rgb_B3 > 0.04045, ((rgb_B3 + 0.055) / 1.055) ** 2.4, rgb_B3 / 12.92)
    matrix = torch.tensor(RGB_TO_XYZ, dtype=rgb_B3.dtype, device=rgb_B3.device)
    xyz_B3 = linear_B3 @ matrix.T / matrix.sum(1)
    x, y, z = torch.where(xyz_B3 > (6 / 29) ** 3, xyz_B3 ** (1 / 3), xyz_B3 * (29 / 6) ** 2 / 3 + 4 / 29).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
