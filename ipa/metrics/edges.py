"""Edge overlap: whether the edges of an image are where those of its prompt are; higher is better, 1 at most.

Edges are the pixels at which the Sobel gradient of a channel exceeds a threshold. The overlap is the F1 score of the
two sets of pixels, where a pixel is found if the other image has an edge at most one pixel away.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ipa.metrics.image_metric import Images, ItemMetric, on_each_size

SIZE_PX = 64
THRESHOLD = 0.1


class EdgeOverlap(ItemMetric):
    """edges: F1 of the edges of image and prompt, both resized to 64 × 64 px. Needs no network."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(["edges"], {"edges": True}, **kwargs)

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        one, other = (on_each_size(edges_at_one_size, each) for each in (generated, references))
        return {"edges": edge_overlap(one, other)}


def edges_at_one_size(pixels_B3HW: Tensor) -> Tensor:
    return find_edges(F.interpolate(pixels_B3HW.float(), (SIZE_PX, SIZE_PX), mode="bilinear", antialias=True))


def find_edges(pixels_B3HW: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """edges_BHW, bool: where the gradient (a fraction of the full range, per pixel) of any channel is that steep."""
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=pixels_B3HW.device) / 8
    padded = F.pad(pixels_B3HW.float() / 2, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    gradient_2 = F.conv2d(padded, torch.stack([across, across.T])[:, None])
    return gradient_2.square().sum(1).sqrt().unflatten(0, pixels_B3HW.shape[:2]).amax(1) > threshold


def edge_overlap(one_BHW: Tensor, other_BHW: Tensor) -> Tensor:
    """F1 of each pair, 1 for two images without edges: overlap_B in [0, 1]."""
    precision_B, recall_B = found_share(one_BHW, other_BHW), found_share(other_BHW, one_BHW)
    return 2 * precision_B * recall_B / (precision_B + recall_B).clamp(min=1e-9)


def found_share(asked_BHW: Tensor, there_BHW: Tensor) -> Tensor:
    """Share of the edges that the other image has within one pixel; without any, whether it has none either."""
    near_BHW = F.max_pool2d(there_BHW.float(), 3, stride=1, padding=1)
    count_B = asked_BHW.flatten(1).sum(1)
    share_B = (asked_BHW * near_BHW).flatten(1).sum(1) / count_B.clamp(min=1)
    return torch.where(count_B > 0, share_B, (~there_BHW.flatten(1).any(1)).float())
