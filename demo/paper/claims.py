"""From values to intervals and verdicts.

A mean has the 95 % bootstrap interval over the items; an item keeps the images of all its training seeds. A comparison
is the mean of paired differences: the same items, noise and training seeds. Its verdict is ``holds`` if the interval
is above 0 and so is the mean of every single training seed, ``contradicted`` if all of these are below 0, and
``undecided`` otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from demo.paper.measuring import Ask, Measured
from demo.paper.plan import STYLES
from ipa.metrics.bootstrap import confidence_interval

HOLDS, CONTRADICTED, UNDECIDED = "holds", "contradicted", "undecided"
# metric → heading
METRICS = {
    "clip_i": "CLIP-I ↑",
    "clip_t": "CLIP-T ↑",
    "retrieval": "retrieval@1 ↑",
    "style": "style right ↑",
    "background": "background right ↑",
    "border": "border ΔE ↓",
    "edges": "edge overlap with the prompt",
    "text": "text followed ↑",
    "control": "edges of the control ↑",
    **{f"drawn_{style}": f"{style} style" for style in STYLES},
}
LOWER_IS_BETTER = ("border",)

Group = tuple[Ask, ...]  # the same setting, one ask for each training seed
Read = Callable[[Ask], Measured]


@dataclass(frozen=True)
class Comparison:
    """``above`` has more of the metric than ``factor`` times ``below`` (less of it where lower is better)."""

    claim: str
    above: str
    below: str
    metric: str
    factor: float = 1.0


@dataclass(frozen=True)
class Threshold:
    """The mean is at least ``least``."""

    claim: str
    row: str
    metric: str
    least: float


@dataclass(frozen=True)
class Chart:
    """Lines of a metric: title → [(x, row)]. ``across`` is a metric on the horizontal axis, in place of x."""

    title: str
    axis: str
    metric: str
    lines: Mapping[str, Sequence[tuple[float, str]]]
    across: str | None = None


@dataclass(frozen=True)
class Section:
    """A claim of the paper and what is measured for it; ``columns`` are metrics, ``strip`` the rows with pictures.

    ``ticks`` are columns of marks: heading → row → tests, all of which must hold.
    """

    number: int
    title: str
    paper: str
    how: str = ""
    rows: Mapping[str, Group] = field(default_factory=dict)
    columns: Sequence[str] = ()
    tests: Sequence[Comparison | Threshold] = ()
    charts: Sequence[Chart] = ()
    strip: Sequence[str] = ()
    ticks: Mapping[str, Mapping[str, Sequence[Comparison | Threshold]]] = field(default_factory=dict)
    listed: Sequence[str] | None = None  # rows of the table; None: all

    def asks(self) -> list[Ask]:
        return [ask for group in self.rows.values() for ask in group]


def statistics(values: Sequence[Sequence[float]], items: Sequence[str]) -> dict[str, Any]:
    """Of one list of values for each training seed: mean, interval, n, and each seed's mean."""
    everything = torch.tensor([x for own in values for x in own], dtype=torch.float64)
    interval = confidence_interval(everything, list(items) * len(values))
    return {
        "mean": rounded(interval.mean),
        "low": rounded(interval.low),
        "high": rounded(interval.high),
        "items": len(items),
        "images": len(everything),
        "by_seed": [rounded(sum(own) / len(own)) for own in values],
    }


def rounded(value: float) -> float | None:
    """Enough digits for every figure on the page; None for what is not a number, which JSON does not have."""
    return None if math.isnan(value) else round(value, 4)


def cell(group: Group, metric: str, read: Read) -> dict[str, Any] | None:
    """None where these prompts have no such value."""
    measured = [read(ask) for ask in group]
    if not measured or metric not in measured[0].values:
        return None
    return statistics([each.values[metric] for each in measured], measured[0].items)


def judged(test: Comparison | Threshold, rows: Mapping[str, Group], read: Read) -> dict[str, Any]:
    if isinstance(test, Threshold):
        difference = [[x - test.least for x in read(ask).values[test.metric]] for ask in rows[test.row]]
        items = read(rows[test.row][0]).items
    else:
        asks = [(ask, partner(ask, rows[test.below])) for ask in rows[test.above]]
        pairs = [(read(one).values[test.metric], read(other).values[test.metric]) for one, other in asks]
        sign = -1 if test.metric in LOWER_IS_BETTER else 1
        difference = [[sign * (x - test.factor * y) for x, y in zip(*pair, strict=True)] for pair in pairs]
        items = read(rows[test.above][0]).items
    found = statistics(difference, items)
    return {**asdict(test), "difference": found, "verdict": verdict(found)}


def partner(ask: Ask, group: Group) -> Ask:
    """The one of the same seed, or the only one."""
    return next(other for other in group if other.seed == ask.seed or len(group) == 1)


def verdict(difference: Mapping[str, Any]) -> str:
    """A single item has no interval and decides nothing."""
    if difference["low"] is None:
        return UNDECIDED
    if difference["low"] > 0 and min(difference["by_seed"]) > 0:
        return HOLDS
    return CONTRADICTED if difference["high"] < 0 and max(difference["by_seed"]) < 0 else UNDECIDED


def together(verdicts: Sequence[str]) -> str:
    """Of several tests: all must hold, one that is contradicted suffices."""
    if not verdicts:
        return ""
    if CONTRADICTED in verdicts:
        return CONTRADICTED
    return HOLDS if set(verdicts) == {HOLDS} else UNDECIDED


def find(section: Section, read: Read) -> dict[str, Any]:
    """All figures of a section, as JSON."""
    content = {"number": section.number, "title": section.title, "paper": section.paper, "how": section.how}
    tests = [judged(test, section.rows, read) for test in section.tests]
    names = list(section.rows) if section.listed is None else section.listed
    return {
        **content,
        "columns": {metric: METRICS[metric] for metric in section.columns},
        "rows": [row(name, section, read) for name in names],
        "ticks": list(section.ticks),
        "tests": tests,
        "charts": [points(chart, section.rows, read) for chart in section.charts],
        "verdict": together([test["verdict"] for test in tests]),
    }


def row(name: str, section: Section, read: Read) -> dict[str, Any]:
    cells = {metric: cell(section.rows[name], metric, read) for metric in section.columns}
    ticks = {
        heading: [judged(test, section.rows, read) for test in tests[name]]
        for heading, tests in section.ticks.items()
        if name in tests
    }
    marks = {
        heading: {"tests": found, "mark": mark([each["verdict"] for each in found])} for heading, found in ticks.items()
    }
    return {"name": name, "parameters": read(section.rows[name][0]).parameters, "cells": cells, "ticks": marks}


def mark(verdicts: Sequence[str]) -> str:
    return {HOLDS: "✓", CONTRADICTED: "×", UNDECIDED: "?"}[together(verdicts)]


def points(chart: Chart, rows: Mapping[str, Group], read: Read) -> dict[str, Any]:
    lines = {}
    for title, places in chart.lines.items():
        lines[title] = [
            {
                "x": x,
                "y": cell(rows[name], chart.metric, read),
                "across": chart.across and cell(rows[name], chart.across, read),
            }
            for x, name in places
        ]
    return {"title": chart.title, "axis": chart.axis, "metric": METRICS[chart.metric], "lines": lines}


def crossings(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Where the first line of a chart rises above the second or falls below it, in words."""
    (one, above), (other, below) = lines.items()
    signs = [(a["x"], a["y"]["mean"] > b["y"]["mean"]) for a, b in zip(above, below, strict=True)]
    changes = [f"between {x:g} and {y:g}" for (x, p), (y, q) in itertools.pairwise(signs) if p != q]
    if changes:
        return f"The lines cross {' and '.join(changes)}."
    first, second = (one, other) if signs[0][1] else (other, one)
    return f"The lines do not cross: {first} is above {second} throughout."
