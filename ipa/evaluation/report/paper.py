"""The paper's Table 1 (Ye et al. 2023), and what is known of the systems by how they are made.

The paper's figures are of COCO val2017, 5,000 image prompts, four pictures each, empty text, λ = 1, 50 steps, guidance
7.5. Its CLIP-T is too high for a cosine of ViT-L/14, so it is set beside CLIPScore, 2.5 · max(cosine, 0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BENCHMARK, NUM_ITEMS, NUM_SEEDS = "coco2017", 5000, 4
PROTOCOL = {"scale": 1.0, "guidance": 7.5, "num_steps": 50}


@dataclass(frozen=True)
class PaperRow:
    """A row of the table, the parameters in millions."""

    title: str
    trained: int
    clip_score: float
    clip_i: float


@dataclass(frozen=True)
class Kind:
    """What a system is. ``custom_models``: its weights stand beside a frozen Stable Diffusion, and work with others
    that were tuned from it; ``tools``: so do structure controls such as ControlNet. None is not known."""

    title: str
    custom_models: bool | None = None
    tools: bool | None = None
    rows: tuple[PaperRow, ...] = ()


def whole(title: str, trained: int, clip_score: float, clip_i: float) -> Kind:
    """A model of its own, or one tuned as a whole."""
    return Kind(title, False, False, (PaperRow(title, trained, clip_score, clip_i),))


def beside(title: str, *rows: PaperRow) -> Kind:
    """Weights beside a frozen Stable Diffusion."""
    return Kind(title, True, True, rows)


KINDS = {
    "open_unclip": whole("Open unCLIP", 893, 0.608, 0.858),
    "kandinsky21": whole("Kandinsky 2.1", 1229, 0.599, 0.855),
    "versatile": whole("Versatile Diffusion", 860, 0.587, 0.830),
    "versatile_dual": Kind("Versatile Diffusion, dual guided", False, False),  # the paper shows its image variations
    "sd_image_variations": whole("SD Image Variations", 860, 0.548, 0.760),
    "sd_unclip": whole("SD unCLIP", 870, 0.584, 0.810),
    "uni_controlnet": beside("Uni-ControlNet (global)", PaperRow("Uni-ControlNet (global control)", 47, 0.506, 0.736)),
    "t2i_style": beside("T2I-Adapter (style)", PaperRow("T2I-Adapter (style)", 39, 0.485, 0.648)),
    "controlnet_shuffle": beside("ControlNet Shuffle", PaperRow("ControlNet Shuffle", 361, 0.421, 0.616)),
    "reference_only": beside("ControlNet reference-only"),
    "seecoder": beside("SeeCoder"),
    "ip_adapter": beside(
        "IP-Adapter",
        PaperRow("IP-Adapter", 22, 0.588, 0.828),
        PaperRow("IP-Adapter, fine-grained", 49, 0.579, 0.835),
    ),
    "ip_adapter_control": beside("IP-Adapter with ControlNet"),
}


def kind_of(name: str) -> Kind:
    """By a method's name, which may be written as `IP-Adapter` or `ip_adapter`."""
    return KINDS.get(plain(name)) or Kind(name.replace("_", " "))


def plain(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower())


def rank(name: str) -> int:
    """The place in the paper's order; unknown systems come last."""
    return [*KINDS, plain(name)].index(plain(name))


def paper_row(name: str, trained: int | None) -> PaperRow | None:
    """The row about this system; where there are several, the one with as many million parameters."""
    rows = kind_of(name).rows
    if len(rows) > 1:
        rows = tuple(row for row in rows if trained is not None and round(trained / 1e6) == row.trained)
    return rows[0] if rows else None


def is_papers_benchmark(name: str, num_items: int, num_seeds: int) -> bool:
    return (name, num_items, num_seeds) == (BENCHMARK, NUM_ITEMS, NUM_SEEDS)


def is_papers_protocol(sampling: Mapping[str, Any], prompt: str | None) -> bool:
    """Whether pictures were made as the paper's were, as far as it tells."""
    return prompt == "empty" and all(sampling.get(name) == value for name, value in PROTOCOL.items())
