"""How many samples find a partner, and at which level of ``by``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def describe_levels(arrays: Mapping[str, Array], usable: Array, have_value: Sequence[Array]) -> dict[str, Any]:
    """Counts of usable samples: per level its groups and what becomes of its samples, and those left ``alone``."""
    waiting, levels = usable.copy(), []
    for level, have in enumerate(have_value):
        starts, members = arrays[f"starts.{level}"], arrays[f"members.{level}"]
        sizes = np.diff(starts)
        paired = np.zeros(len(usable), bool)
        paired[members[has_others(np.repeat(np.arange(len(sizes)), sizes), arrays[f"differs.{level}"], sizes)]] = True
        levels.append(
            {
                "groups": len(sizes),
                "of_one": int((sizes == 1).sum()),
                "smallest": int(sizes.min()) if len(sizes) else 0,
                "median": float(np.median(sizes)) if len(sizes) else 0.0,
                "largest": int(sizes.max()) if len(sizes) else 0,
                "without": int((usable & ~have).sum()),
                "paired": int((waiting & paired).sum()),
            }
        )
        waiting &= ~paired
    return {"samples": int(usable.sum()), "levels": levels, "alone": int(waiting.sum())}


def has_others(group_of: Array, differs: Array, sizes: Array) -> Array:
    """Which members have one in their group that differs from them; both arrays are sorted as in the index."""
    new = np.ones(len(differs), bool)
    new[1:] = (group_of[1:] != group_of[:-1]) | (differs[1:] != differs[:-1])
    blocks = np.cumsum(new) - 1
    return sizes[group_of] > np.bincount(blocks)[blocks] if len(differs) else new


def in_words(about: Mapping[str, Any]) -> list[str]:
    """Lines for the log and the console."""
    report, lines = about["report"], list[str]()
    left = report["samples"]
    for name, level in zip(about["by"], report["levels"], strict=True):
        samples = f"{left:,} samples{' that are left' if left < report['samples'] else ''}"
        left -= level["paired"]
        lines.append(
            f"pairs by {name}: {level['paired']:,} of {samples} have a partner here; "
            f"{level['groups']:,} groups of {level['smallest']:,} to {level['largest']:,} samples (median "
            f"{level['median']:,.0f}), {level['of_one']:,} of them of one sample; {level['without']:,} samples without "
            f"json.{name}"
        )
    if about["differ"]:
        lines[-1] += f"; partners differ in json.{about['differ']}"
    if report["alone"]:
        share = 100 * report["alone"] / report["samples"]
        lines.append(f"{report['alone']:,} samples ({share:.1f} %) have no partner and are their own reference")
    return lines
