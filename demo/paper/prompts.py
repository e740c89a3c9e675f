"""The image prompts, and the values of images that were made from them. The judge is demo/judge, which no system reads.

clip_i, clip_t      cosine with the image prompt, with its caption
retrieval           1 if the nearest image prompt is the image's own
style, background   1 if the drawing style, the nearest of the twelve backgrounds, is the image prompt's
drawn_STYLE         1 if the drawing style is this one
border              distance of the border colours (ΔE)
edges               overlap of the edges with the image prompt's: the structure that leaks
text                1 if the text's caption is among the nearest five of all texts
control             overlap of the edges with those of the control image, whether or not it was used
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import captions_of_concepts, nearest_colour, tell_styles
from torch import Tensor
from world import compose, read_world

from demo.paper.plan import HELDOUT, JUDGE, STYLES, UNSEEN
from ipa.data.images.transforms import cover, read_picture
from ipa.evaluation.methods.method import Prompt
from ipa.files import pictures_in
from ipa.metrics.border import border_distance
from ipa.metrics.clip import load_scorer
from ipa.metrics.clip_scores import caption_ranks, retrieve
from ipa.metrics.edges import edge_overlap, find_edges
from ipa.metrics.image_metric import image_keys
from ipa.types import to_uint8, to_unit_range

SIZE_PX = 64
TOP = 5


@dataclass(frozen=True)
class Prompts:
    """pixels_B3HW in [-1, 1]; ``captions`` and ``styles`` are empty where they are not known."""

    pixels_B3HW: Tensor
    ids: list[str]
    captions: list[str]
    styles: list[str]
    other_texts: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def given(self, rows: Sequence[int], texts: Sequence[str], seed: int) -> list[Prompt]:
        images = to_uint8(self.pixels_B3HW)
        return [Prompt(images[row], texts[row], 1000 * seed + row) for row in rows]

    def control_pixels(self) -> Tensor:
        """Edges of the image prompt half the list away, control_B3HW in {0, 1}."""
        return self.controls()[:, None].float().expand(-1, 3, -1, -1)

    def controls(self) -> Tensor:
        return find_edges(self.pixels_B3HW.roll(len(self) // 2, 0))

    def values(self, pixels: Tensor, texts: Sequence[str] | None) -> dict[str, Tensor]:
        judge: Any = load_scorer(f"local-dir:{JUDGE}")
        image_BE, prompt_BE = judge.embed_images(pixels), judge.embed_images(self.pixels_B3HW)
        edges_BHW = find_edges(pixels)
        found = {
            "clip_i": (image_BE * prompt_BE).sum(1),
            "retrieval": retrieve(image_BE, prompt_BE, image_keys(self.pixels_B3HW)),
            "border": border_distance(pixels, self.pixels_B3HW),
            "background": (nearest_colour(pixels) == nearest_colour(self.pixels_B3HW)).float(),
            "edges": edge_overlap(edges_BHW, find_edges(self.pixels_B3HW)),
            "control": edge_overlap(edges_BHW, self.controls()),
        }
        if self.captions:
            found["clip_t"] = (image_BE * judge.embed_texts(self.captions)).sum(1)
        if self.styles:
            told = tell_styles(judge, pixels, self.captions, sorted(set(self.styles)))
            found["style"] = torch.tensor([float(a == b) for a, b in zip(told, self.styles, strict=True)])
        for style in STYLES:
            found[f"drawn_{style}"] = told_as(judge, pixels, texts or self.captions, style)
        if texts is not None:
            found["text"] = (caption_ranks(image_BE, judge.embed_texts(list(texts))) < TOP).float()
        return found


def told_as(judge: Any, pixels: Tensor, captions: Sequence[str], style: str) -> Tensor:
    """1 where an image is in this drawing style of all; ``captions`` say what it shows, "" where that is not known."""
    told = tell_styles(judge, pixels, list(captions) or [""] * len(pixels), list(STYLES))
    return torch.tensor([float(each == style) for each in told])


@functools.cache
def read_prompts(kind: str, count: int, own: str | None = None) -> Prompts:
    if kind == "own":
        paths = pictures_in(own, "own")[:count]
        pixels = to_unit_range(torch.stack([cover(read_picture(path, "own"), (SIZE_PX, SIZE_PX)) for path in paths]))
        return Prompts(pixels, [path.name for path in paths], [], [], captions_of_concepts(len(paths)))
    world = read_world(Path({"heldout": HELDOUT, "unseen": UNSEEN}[kind]))
    pixels = compose(world.rgba, torch.zeros(len(world), dtype=torch.long))[:count]  # the pictures are opaque
    ids, captions, styles = (values[:count] for values in (world.concepts, world.captions, world.styles))
    return Prompts(pixels, ids, captions, styles if kind == "heldout" else [], captions_of_concepts(len(ids)))
