"""Images and captions to score."""

from typing import Any

import tiny
from torch import Tensor

from ipa.types import to_unit_range

CAPTIONS = [["cat", "a dog"], ["a dog"], ["red hearts", "b", "cat"], ["b"], ["", "the end"], ["the end"]]


def images(seed: int, count: int = 6, size_px: int = tiny.REFERENCE_PX) -> Tensor:
    return to_unit_range(tiny.make_pictures(count, size_px, seed))


def told(metric: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}
