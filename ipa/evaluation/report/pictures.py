"""Which images the page shows, and their thumbnails."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ipa.errors import UserError
from ipa.evaluation.report.reading import Evaluation, Item, System

WEBP_QUALITY = 82
CLIP_I = "clip_i"


@dataclass(frozen=True)
class Shown:
    """The images on the page: ``rows`` items sampled with ``seed``, the ``best`` and as many worst of ``system``.

    Rows of the grid are left out if the images would take more than ``limit_mb`` of the file.
    """

    rows: int = 12
    seed: int = 0
    best: int = 6
    system: str | None = None
    thumbnail_px: int = 160
    limit_mb: float = 8.0


def choose_items(evaluation: Evaluation, count: int, seed: int) -> list[Item]:
    """``count`` items in the benchmark's order, if possible of those that every system with images has."""
    everywhere = [item for item in evaluation.items if all(item.id in system.pictures for system in evaluation.drawn)]
    pool = everywhere if len(everywhere) >= count else list(evaluation.items)
    positions = random.Random(seed).sample(range(len(pool)), min(count, len(pool)))
    return [pool[position] for position in sorted(positions)]


def choose_system(evaluation: Evaluation, label: str | None) -> System | None:
    """The one with that label; without a label, the one with the highest CLIP-I, None if there is none.

    Raises UserError for a label that no system with CLIP-I has.
    """
    scored = [system for system in evaluation.systems if system.per_item.get(CLIP_I) and CLIP_I in system.scores]
    if label is None:
        return max(scored, key=lambda system: system.scores[CLIP_I].value, default=None)
    found = {system.label: system for system in scored}
    if label not in found:
        raise UserError(f"system={label}: not a system with CLIP-I; possible: {', '.join(found) or 'none'}")
    return found[label]


def extremes(system: System, items: Sequence[Item], count: int) -> tuple[list[Item], list[Item]]:
    """Items with the highest CLIP-I, best first, and with the lowest, worst first; none is in both."""
    values = system.per_item[CLIP_I]
    ranked = sorted((item for item in items if item.id in values), key=lambda item: (-values[item.id], item.id))
    count = min(count, len(ranked) // 2)
    return ranked[:count], ranked[::-1][:count]


def read_thumbnail(path: Path | None, edge_px: int) -> Image.Image | None:
    """An RGB image whose longer edge has at most ``edge_px``; None if it is missing or cannot be read."""
    if path is None:
        return None
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError):
        return None
    small.thumbnail((edge_px, edge_px), Image.Resampling.LANCZOS)
    return small


def thumbnail_uri(path: Path | None, edge_px: int) -> str | None:
    """The same as a data URI."""
    small, content = read_thumbnail(path, edge_px), io.BytesIO()
    if small is None:
        return None
    small.save(content, format="WEBP", quality=WEBP_QUALITY, method=4)
    return data_uri("webp", content.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
