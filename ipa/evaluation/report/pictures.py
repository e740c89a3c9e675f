"""Which pictures the page shows, and their thumbnails.

Items of the grid are drawn with a seed; beside them stand those where a chosen system did best and worst.
"""

from __future__ import annotations

import base64
import functools
import io
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ipa.errors import UserError
from ipa.evaluation.report.reading import Evaluation, Item, System

QUALITY = 82
CLIP_I = "clip_i"


def choose_items(evaluation: Evaluation, count: int, seed: int) -> list[Item]:
    """``count`` items in the benchmark's order, of those that all drawn systems have if there are enough."""
    everywhere = [item for item in evaluation.items if all(item.id in system.pictures for system in evaluation.drawn)]
    pool = everywhere if len(everywhere) >= count else list(evaluation.items)
    places = random.Random(seed).sample(range(len(pool)), min(count, len(pool)))
    return [pool[place] for place in sorted(places)]


def choose_system(evaluation: Evaluation, label: str | None) -> System | None:
    """The one asked for, else that of the highest CLIP-I; None where no system has any.

    Raises UserError for a label that is not there or has no CLIP-I.
    """
    scored = [system for system in evaluation.systems if system.per_item.get(CLIP_I) and CLIP_I in system.scores]
    if label is None:
        return max(scored, key=lambda system: system.scores[CLIP_I].value, default=None)
    system = evaluation.system(label)
    if system not in scored:
        labels = ", ".join(each.label for each in scored) or "none"
        raise UserError(f"system={label} has no CLIP-I of single items; those that have: {labels}")
    return system


def extremes(evaluation: Evaluation, system: System, count: int) -> tuple[list[Item], list[Item]]:
    """Items with the highest CLIP-I, best first, and with the lowest, worst first; none is in both."""
    values = system.per_item[CLIP_I]
    ranked = sorted(
        (item for item in evaluation.items if item.id in values), key=lambda item: (-values[item.id], item.id)
    )
    count = min(count, len(ranked) // 2)
    return ranked[:count], ranked[::-1][:count]


def first_picture(system: System, item: Item) -> Path | None:
    numbers = system.pictures.get(item.id, {})
    return numbers[min(numbers)] if numbers else None


def all_pictures(system: System, item: Item) -> Sequence[Path]:
    return [path for _, path in sorted(system.pictures.get(item.id, {}).items())]


class Thumbnails:
    """Pictures made small and put into the page; ``bytes_used`` counts what they take there."""

    def __init__(self, edge_px: int) -> None:
        self.edge_px, self.bytes_used = edge_px, 0
        self._address = functools.cache(self._encode)

    def address(self, path: Path | None) -> str | None:
        """A data: address of the thumbnail; None for a picture that is missing or cannot be read."""
        address = None if path is None else self._address(path)
        self.bytes_used += len(address or "")
        return address

    def _encode(self, path: Path) -> str | None:
        content = io.BytesIO()
        try:
            with Image.open(path) as picture:
                small = picture.convert("RGB")
                small.thumbnail((self.edge_px, self.edge_px), Image.Resampling.LANCZOS)
        except (OSError, ValueError):
            return None
        small.save(content, format="WEBP", quality=QUALITY, method=4)
        return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
