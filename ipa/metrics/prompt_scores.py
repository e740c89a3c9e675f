"""How well generated pictures follow their image prompts.

* CLIP-I: mean cosine of the embeddings of picture and prompt, in [-1, 1] (Ye et al. 2023, section 4.1.3).
* CLIP-T: mean cosine of the embeddings of picture and prompt's caption, which generation may not have been given.
* retrieval@1: share of pictures whose nearest prompt, among all prompts seen, is their own; chance is 1 / count.
* border: mean CIE Lab distance (ΔE 1976) between the border colours of picture and prompt; lower is better.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ipa.metrics.clip import ClipScorer

# linear sRGB → CIE XYZ (IEC 61966-2-1); the rows add up to the white point D65
RGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


class PromptScores(Metric):
    """CLIP-I, CLIP-T, retrieval@1 and border distance of all pairs given to ``update``, over one or many processes."""

    full_state_update = False
    higher_is_better = None

    scorer: ClipScorer
    generated_BE: list[Tensor]
    prompts_BE: list[Tensor]
    captions_BE: list[Tensor]
    border_B: list[Tensor]

    def __init__(self, scorer: ClipScorer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # kept out of the module tree: the scorer is shared and must not be moved, saved or reset with the metric
        object.__setattr__(self, "scorer", scorer)
        for name in ("generated_BE", "prompts_BE", "captions_BE", "border_B"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, generated_B3HW: Tensor, prompts_B3HW: Tensor, captions: list[str] | None = None) -> None:
        """Pixels in [-1, 1], the two may differ in size. Without the prompts' ``captions`` there is no CLIP-T."""
        if captions is not None:
            self.captions_BE.append(self.scorer.embed_texts(captions))
        self.generated_BE.append(self.scorer.embed_images(generated_B3HW))
        self.prompts_BE.append(self.scorer.embed_images(prompts_B3HW))
        self.border_B.append(border_distance(generated_B3HW, prompts_B3HW).to(self.generated_BE[-1].device))

    def compute(self) -> dict[str, Tensor]:
        generated_BE, prompts_BE = dim_zero_cat(self.generated_BE), dim_zero_cat(self.prompts_BE)
        nearest_B = (generated_BE @ prompts_BE.T).argmax(1)
        own_B = torch.arange(len(nearest_B), device=nearest_B.device)
        # a list, but one tensor once several processes have put theirs together
        captioned = len(self.captions_BE) > 0
        text = {"clip_t": (generated_BE * dim_zero_cat(self.captions_BE)).sum(1).mean()} if captioned else {}
        return {
            "clip_i": (generated_BE * prompts_BE).sum(1).mean(),
            **text,
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
    return rgb_to_lab(((median_B3 + 1) / 2).clamp(0, 1))


def rgb_to_lab(rgb_B3: Tensor) -> Tensor:
    """sRGB in [0, 1] → CIE Lab (D65): L in [0, 100], a and b about ± 100."""
    linear_B3 = torch.where(rgb_B3 > 0.04045, ((rgb_B3 + 0.055) / 1.055) ** 2.4, rgb_B3 / 12.92)
    matrix = torch.tensor(RGB_TO_XYZ, dtype=rgb_B3.dtype, device=rgb_B3.device)
    xyz_B3 = linear_B3 @ matrix.T / matrix.sum(1)
    x, y, z = torch.where(xyz_B3 > (6 / 29) ** 3, xyz_B3 ** (1 / 3), xyz_B3 * (29 / 6) ** 2 / 3 + 4 / 29).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def caption_ranks(image_BE: Tensor, text_BE: Tensor) -> Tensor:
    """Rank of each picture's own caption among all captions, 0 for the nearest: rank_B."""
    similarity = image_BE @ text_BE.T
    return (similarity > similarity.diagonal()[:, None]).sum(1)
