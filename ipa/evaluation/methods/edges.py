"""Edges of an image (Canny 1986), the input of a ControlNet for edges.

    G = |∂x| + |∂y| of the image (Sobel); an edge is where G is a maximum across the edge,
    starts above ``high`` and continues above ``low``

Thresholds are in OpenCV's units: Sobel sums over levels of 0 to 255, added over both directions. ControlNets were
trained with thresholds of 100 and 200 and no blur.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
SOBEL_X = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
# steps across an edge, by the direction of its gradient: →, ↘, ↓, ↙ as (down, right)
ACROSS = ((0, 1), (1, 1), (1, 0), (1, -1))


def canny(image_3HW: Tensor, low: float = 100.0, high: float = 200.0) -> Tensor:
    """uint8 image → edges_HW, 1 on an edge and 0 elsewhere."""
    gray_HW = (image_3HW.float() * torch.tensor(LUMA)[:, None, None]).sum(0)
    size_HW, direction_HW = gradient(gray_HW)
    thin_HW = size_HW * is_largest_across(size_HW, direction_HW)
    low, high = sorted((low, high))  # as OpenCV
    return connected(thin_HW > high, thin_HW > low).float()


def gradient(gray_HW: Tensor) -> tuple[Tensor, Tensor]:
    """|∂x| + |∂y|, and the index in ``ACROSS`` nearest to the direction."""
    kernel_33 = torch.tensor(SOBEL_X)
    padded = F.pad(gray_HW[None, None], [1] * 4, mode="replicate")
    x_HW, y_HW = F.conv2d(padded, torch.stack([kernel_33, kernel_33.T])[:, None])[0]
    eighths_HW = torch.round(torch.atan2(y_HW, x_HW) / (math.pi / 4)).long()
    return x_HW.abs() + y_HW.abs(), eighths_HW % 4


def is_largest_across(size_HW: Tensor, direction_HW: Tensor) -> Tensor:
    """Of two equal neighbours the one further right or down is the edge, so that edges are one pixel wide."""
    height, width = size_HW.shape
    padded = F.pad(size_HW, [1] * 4)
    largest_HW = torch.zeros_like(size_HW, dtype=torch.bool)
    for direction, (down, right) in enumerate(ACROSS):
        behind = padded[1 - down :, 1 - right :][:height, :width]
        ahead = padded[1 + down :, 1 + right :][:height, :width]
        largest_HW |= (direction_HW == direction) & (size_HW >= behind) & (size_HW > ahead)
    return largest_HW


def connected(strong_HW: Tensor, weak_HW: Tensor) -> Tensor:
    """The weak pixels connected to a strong one, over sides or corners."""
    found_HW, count = strong_HW, -1
    while count != (count := int(found_HW.sum())):
        found_HW = weak_HW & (F.max_pool2d(found_HW[None].float(), 3, 1, 1)[0] > 0)
    return found_HW
