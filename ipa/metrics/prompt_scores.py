"""How well generated pictures follow their image prompts.

* CLIP-I: mean cosine of the embeddings of picture and prompt, in [-1, 1] (Ye et al. 2023, section 4.1.3).
* retrieval@1: share of pictures whose nearest prompt, among all prompts seen, is their own; chance is 1 / count.
* border: mean CIE Lab distance (ΔE 1976) between the border colours of picture and prompt; lower is better.
"""

from __future__ import annotations

from typing import Any

import torch
from skimage.color import rgb2lab
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ipa.metrics.clip import ClipScorer


class PromptScores(Metric):
    """CLIP-I, retrieval@1 and border distance over all pairs given to ``update``; equal over 1 or many processes."""

    full_state_update = False
    higher_is_better = None

    generated_BE: list[Tensor]
    prompts_BE: list[Tensor]
    border_B: list[Tensor]

    def __init__(self, scorer: ClipScorer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # kept out of the module tree: the scorer is shared and must not be moved, saved or reset with the metric
        object.__setattr__(self, "scorer", scorer)
        for name in ("generated_BE", "prompts_BE", "border_B"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, generated_B3HW: Tensor, prompts_B3HW: Tensor) -> None:
        """Pixels in [-1, 1]; the two may differ in size."""
        self.generated_BE.append(self.scorer.embed_images(generated_B3HW))
        self.prompts_BE.append(self.scorer.embed_images(prompts_B3HW))
        self.border_B.append(border_distance(generated_B3HW, prompts_B3HW))

    def compute(self) -> dict[str, Tensor]:
        generated_BE, prompts_BE = dim_zero_cat(self.generated_BE), dim_zero_cat(self.prompts_BE)
        nearest_B = (generated_BE @ prompts_BE.T).argmax(1)
        own_B = torch.arange(len(nearest_B), device=nearest_B.device)
        return {
            "clip_i": (generated_BE * prompts_BE).sum(1).mean(),
            "retrieval_at_1": (nearest_B == own_B).float().mean(),
            "border_lab": dim_zero_cat(self.border_B).mean(),
        }


def border_distance(generated_B3HW: Tensor, prompts_B3HW: Tensor, width: float = 1 / 16) -> Tensor:
    """ΔE between the median border colours of each pair: distance_B. ``width`` is a share of the edge."""
    return (border_lab(generated_B3HW, width) - border_lab(prompts_B3HW, width)).square().sum(1).sqrt()


def border_lab(pixels_B3HW: Tensor, width: float) -> Tensor:
    """Median colour of the frame around each picture, in CIE Lab (D65): lab_B3."""
    edge = max(1, round(width * pixels_B3HW.shape[-1]))
    inside = torch.zeros(pixels_B3HW.shape[-2:], dtype=torch.bool, device=pixels_B3HW.device)
    inside[edge:-edge, edge:-edge] = True
    median_B3 = pixels_B3HW.float()[..., ~inside].median(-1).values
    lab = rgb2lab(((median_B3 + 1) / 2).clamp(0, 1).cpu().numpy())
    return torch.from_numpy(lab).float()


def caption_ranks(image_BE: Tensor, text_BE: Tensor) -> Tensor:
    """Rank of each picture's own caption among all captions, 0 for the nearest: rank_B."""
    similarity = image_BE @ text_BE.T
    return (similarity > similarity.diagonal()[:, None]).sum(1)
