"""The names of metrics and settings as people read them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A column's title, its decimals, and what a reader should know of it."""

    title: str
    digits: int = 3
    about: str = ""


METRICS = {
    "clip_score": Heading(
        "CLIP-T, CLIPScore",
        3,
        "how well a picture fits its prompt's caption: 2.5 · max(cosine, 0) of CLIP's embeddings, the paper's CLIP-T",
    ),
    "clip_t": Heading("CLIP-T, cosine", 3, "the same as a plain cosine"),
    "clip_i": Heading(
        "CLIP-I",
        3,
        "how near a picture is to its image prompt: cosine of CLIP's embeddings, 1 for the same",
    ),
    "retrieval_at_1": Heading(
        "Retrieval@1", 3, "share of pictures whose nearest image prompt, among all of them, is their own"
    ),
    "dinov2": Heading("DINOv2", 3, "as CLIP-I, seen by DINOv2, on which none of the systems conditions"),
    "dreamsim": Heading("DreamSim", 3, "distance to the image prompt, made after people's judgement"),
    "fid": Heading("FID", 2, "distance between pictures and image prompts as two sets, by Inception's features"),
    "kid": Heading("KID", 4, "the same without its bias in small sets"),
    "fid_judge": Heading(
        "FID, judge",
        3,
        "distance between pictures and image prompts as two sets, by the features of the CLIP that scores",
    ),
    "kid_judge": Heading("KID, judge", 4, "the same without its bias in small sets"),
    "border_lab": Heading("Border ΔE", 1, "colour distance (CIE Lab) between the borders of picture and image prompt"),
    "aesthetic": Heading("Aesthetic", 2, "how much people would like the picture, as a small network has it"),
}

# settings of sampling that sweeps vary, in the order of columns
AXES = {"scale": "λ", "guidance": "guidance", "num_steps": "steps", "image_size_px": "size, px"}
PROMPTS = {"empty": "empty text", "caption": "captions"}


def heading(metric: str) -> Heading:
    return METRICS.get(metric) or Heading(metric.replace("_", " "))


def sorted_metrics(names: set[str]) -> list[str]:
    """As listed above, then others by name."""
    order = list(METRICS)
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def plain_number(value: object) -> str:
    """1.0 as 1."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
