"""Samples that are rejected because of a number: a score in the metadata, the picture's size, the caption's length.

docs/data.md has the options. Rejects are counted as ``filter: NAME``, or ``filter: NAME is missing`` without a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ipa.data.rejects import Rejected
from ipa.data.shards.fields import ENTRY, Fields, as_list, is_entry
from ipa.errors import UserError

OPTIONS = ("key", "min", "max", "missing")
MISSING = ("reject", "keep")

# of a sample and its first usable caption
QUANTITIES: dict[str, Callable[[Fields, str], float]] = {
    "short_side_px": lambda fields, caption: min(fields.size),
    "aspect_ratio": lambda fields, caption: max(fields.size) / min(fields.size),  # long side / short side
    "caption_characters": lambda fields, caption: len(caption),
    "caption_words": lambda fields, caption: len(caption.split()),
}
WAYS = f"{', '.join(QUANTITIES)}, or {ENTRY}NAME for a number in the metadata"


@dataclass(frozen=True)
class Filter:
    """Accepts samples whose number is at least ``low`` and at most ``high``."""

    name: str
    keys: tuple[str, ...]
    low: float
    high: float
    keep_missing: bool = False

    def check(self, fields: Fields, caption: str) -> None:
        """Raises ``Rejected``."""
        values = (measure(key, fields, caption) for key in self.keys)
        value = next((value for value in values if value is not None), None)
        if value is None and not self.keep_missing:
            raise Rejected(f"filter: {self.name} is missing", f"none of {', '.join(self.keys)}")
        if value is not None and not self.low <= value <= self.high:
            raise Rejected(f"filter: {self.name}", f"{value:g}")


def measure(key: str, fields: Fields, caption: str) -> float | None:
    """None if the sample has no such number; the metadata may hold it as text."""
    if not key.startswith(ENTRY):
        return QUANTITIES[key](fields, caption)
    try:
        value = float(fields.metadata[key.removeprefix(ENTRY)])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(value) else value


def read_filters(filters: Mapping[str, Any] | None, option: str = "data.filters") -> tuple[Filter, ...]:
    """From YAML; raises one UserError for everything that is wrong, naming the ``option``."""
    if not isinstance(filters or {}, Mapping):
        raise UserError(f"{option}={filters}: give a mapping name: {{key, min, max, missing}}")
    given = {str(name): values for name, values in (filters or {}).items() if values is not None}
    if wrong := [f"{option}.{name}: {what}" for name, values in given.items() for what in faults(values)]:
        raise UserError("\n".join(wrong))
    found = []
    for name, values in given.items():
        low, high = (values.get(limit) for limit in ("min", "max"))
        limits = -math.inf if low is None else float(low), math.inf if high is None else float(high)
        found.append(Filter(name, tuple(as_list(values["key"])), *limits, values.get("missing") == "keep"))
    return tuple(found)


def faults(values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return [f"{values} is no filter; give {{{', '.join(OPTIONS)}}}, or null to turn it off"]
    found = [f"unknown option {name}; there are {', '.join(OPTIONS)}" for name in values if name not in OPTIONS]
    keys = as_list(values.get("key"))
    found += [f"key={key}: give {WAYS}" for key in keys or [None] if not (is_entry(key) or key in list(QUANTITIES))]
    limits: dict[str, Any] = {name: values.get(name) for name in ("min", "max") if values.get(name) is not None}
    found += [f"{name}={value} is no number" for name, value in limits.items() if not is_number(value)]
    if not limits:
        found.append("give min, max or both")
    if all(map(is_number, limits.values())) and limits.get("min", -math.inf) > limits.get("max", math.inf):
        found.append(f"no number is at least min={limits['min']} and at most max={limits['max']}")
    if values.get("missing") not in (None, *MISSING):
        found.append(f"missing={values['missing']}: give {' or '.join(MISSING)}")
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
