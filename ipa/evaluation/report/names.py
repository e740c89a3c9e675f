"""Titles of metrics, settings and systems, and the values in Table 1 of the paper (Ye et al. 2023)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A metric's title, its decimals and a short explanation."""

    title: str
    digits: int = 3
    about: str = ""


METRICS = {
    "clip_score": Heading(
        "CLIP-T, CLIPScore",
        about="2.5 · max(cosine, 0) of the CLIP embeddings of image and caption, the paper's CLIP-T",
    ),
    "clip_t": Heading("CLIP-T, cosine", about="the plain cosine of these embeddings"),
    "clip_i": Heading("CLIP-I", about="cosine of the CLIP embeddings of image and image prompt, 1 if they are equal"),
    "retrieval_at_1": Heading("Retrieval@1", about="share of images whose own image prompt is the nearest of all"),
    "dinov2": Heading("DINOv2", about="like CLIP-I, with DINOv2, which no system conditions on"),
    "dreamsim": Heading("DreamSim", about="perceptual distance to the image prompt, trained on human judgements"),
    "fid": Heading("FID", 2, "distance between the images and the image prompts as two sets, in Inception features"),
    "kid": Heading("KID", 4, "the same, unbiased for small sets"),
    "fid_judge": Heading("FID, judge", about="FID in the features of the CLIP model that computes the scores"),
    "kid_judge": Heading("KID, judge", 4, "the same, unbiased for small sets"),
    "border_lab": Heading("Border ΔE", 1, "colour difference (CIE Lab) of the borders of image and image prompt"),
    "edges": Heading("Edges", about="overlap (F1) of the edges of image and image prompt"),
    "aesthetic": Heading("Aesthetic", 2, "human rating of the image, predicted by a small network"),
}

# sampling options that sweeps vary → title, in the order of the columns
AXES = {
    "scale": "λ",
    "guidance": "guidance",
    "guidance_rescale": "rescaling φ",
    "num_steps": "steps",
    "image_size_px": "size, px",
}


def heading(metric: str) -> Heading:
    return METRICS.get(metric) or Heading(metric.replace("_", " "))


def sorted_metrics(names: set[str]) -> list[str]:
    """In the order of ``METRICS``, then unknown ones by name."""
    return [*(name for name in METRICS if name in names), *sorted(names - METRICS.keys())]


def plain_number(value: object) -> str:
    """1.0 as 1."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class PaperRow:
    """A row of the table; ``trained`` in millions of parameters.

    The paper's CLIP-T is too high for a cosine of ViT-L/14, so we take it for CLIPScore, 2.5 · max(cosine, 0).
    """

    trained: int
    clip_score: float
    clip_i: float


@dataclass(frozen=True)
class Kind:
    """A system's title and its rows in the paper.

    ``frozen_base``: whether its weights are added to a frozen Stable Diffusion, so that they work with models
    fine-tuned from it and with structure controls such as ControlNet. None is unknown.
    """

    title: str
    frozen_base: bool | None = None
    rows: tuple[PaperRow, ...] = ()


KINDS = {
    "open_unclip": Kind("Open unCLIP", False, (PaperRow(893, 0.608, 0.858),)),
    "kandinsky21": Kind("Kandinsky 2.1", False, (PaperRow(1229, 0.599, 0.855),)),
    "versatile": Kind("Versatile Diffusion", False, (PaperRow(860, 0.587, 0.830),)),
    "versatile_dual": Kind("Versatile Diffusion, dual guided", False),  # the paper has its image variations only
    "sd_image_variations": Kind("SD Image Variations", False, (PaperRow(860, 0.548, 0.760),)),
    "sd_unclip": Kind("SD unCLIP", False, (PaperRow(870, 0.584, 0.810),)),
    "uni_controlnet": Kind("Uni-ControlNet (global)", True, (PaperRow(47, 0.506, 0.736),)),
    "t2i_style": Kind("T2I-Adapter (style)", True, (PaperRow(39, 0.485, 0.648),)),
    "controlnet_shuffle": Kind("ControlNet Shuffle", True, (PaperRow(361, 0.421, 0.616),)),
    "reference_only": Kind("ControlNet reference-only", True),
    "seecoder": Kind("SeeCoder", True),
    # global and fine-grained
    "ip_adapter": Kind(
        "IP-Adapter", True, (PaperRow(22, 0.588, 0.828), PaperRow(49, 0.579, 0.835))
    ),  # fine-grained: 49
    "ip_adapter_control": Kind("IP-Adapter with ControlNet", True),
}


def kind_of(name: str) -> Kind:
    """By a method's name, as `IP-Adapter` or `ip_adapter`."""
    return KINDS.get(plain(name)) or Kind(name.replace("_", " "))


def plain(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower())


def rank(name: str) -> int:
    """Position in the paper's order; unknown systems come last."""
    return [*KINDS, plain(name)].index(plain(name))


def paper_row(name: str, trained: int | None) -> PaperRow | None:
    """The system's row; if it has several, the one with that number of parameters."""
    rows = kind_of(name).rows
    if len(rows) > 1:
        rows = tuple(row for row in rows if trained is not None and round(trained / 1e6) == row.trained)
    return rows[0] if rows else None
