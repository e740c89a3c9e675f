"""Curves over sweeps: runs that differ only in λ, in guidance or in steps, found by their settings.

Charts are drawn by matplotlib and contain no text of the user's, in which it would read ``$`` as mathematics. The page
adds title and legend.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ipa.evaluation.report.names import AXES, heading, kind_of, plain_number
from ipa.evaluation.report.pictures import data_uri
from ipa.evaluation.report.reading import Evaluation, Score, System

SWEPT_AXES = ("scale", "guidance", "num_steps")
SWEPT_METRICS = ("clip_i", "clip_t")
# runs of one sweep may differ in these
NO_DIFFERENCE = ("versions", "device", "seconds", "batch_size", "metrics", "num_seeds")
# these follow from other settings, so that a title need not name them
UNNAMED = ("method.trained", "method.uses_text", "settings._target_")

AXIS_TITLES = {"scale": "λ, weight of the image prompt", "guidance": "guidance", "num_steps": "number of steps"}
COLOURS = ("#2a78d6", "#eb6834", "#1baf7a", "#4a3aa7", "#eda100", "#e34948", "#008300", "#e87ba4")
INK, LINE = "#63625e", "#e2e1dc"
# without a salt, matplotlib's ids are random
STYLE: dict[Any, Any] = {"svg.hashsalt": "ipa", "font.family": "DejaVu Sans", "font.size": 10, "axes.axisbelow": True}


@dataclass(frozen=True)
class Series:
    """One line: ``points`` are (value on the axis, score), sorted, with at least two different values."""

    title: str
    points: Sequence[tuple[float, Score]]


@dataclass(frozen=True)
class Chart:
    axis: str
    metric: str
    series: Sequence[Series]

    @property
    def title(self) -> str:
        return f"{heading(self.metric).title} against {AXES[self.axis]}"


def find_charts(evaluation: Evaluation) -> list[Chart]:
    """Every chart that the runs allow, those against λ first."""
    charts = []
    for axis in SWEPT_AXES:
        groups = [(title_of(each[0], evaluation.systems, axis), each) for each in sweeps(evaluation.systems, axis)]
        for metric in SWEPT_METRICS:
            lines = [Series(title, points_of(group, axis, metric)) for title, group in groups]
            series = [line for line in lines if len({x for x, _ in line.points}) > 1]
            charts += [Chart(axis, metric, series)] if series else []
    return charts


def sweeps(systems: Sequence[System], axis: str) -> list[list[System]]:
    """Groups of runs that differ in ``axis`` and in nothing else."""
    groups: dict[str, list[System]] = {}
    for system in systems:
        if system.scores and system.sampling.get(axis) is not None:
            others = {name: value for name, value in identity(system).items() if name != f"sampling.{axis}"}
            groups.setdefault(json.dumps(others, sort_keys=True), []).append(system)
    return [group for group in groups.values() if len({each.sampling[axis] for each in group}) > 1]


def identity(system: System) -> dict[str, Any]:
    """Dotted name → value of every setting that decides the images; 2 and 2.0 are the same guidance."""
    kept = {name: value for name, value in system.settings.items() if name not in NO_DIFFERENCE}
    return {name: float(value) if type(value) is int else value for name, value in flattened(kept)}


def flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def points_of(group: Sequence[System], axis: str, metric: str) -> list[tuple[float, Score]]:
    points = [(float(each.sampling[axis]), each.scores[metric]) for each in group if metric in each.scores]
    return sorted(points, key=lambda point: (point[0], point[1].value))


def title_of(system: System, systems: Sequence[System], axis: str) -> str:
    """The system and the settings, other than ``axis``, that distinguish this run from its other runs."""
    alike = [identity(each) for each in systems if each.scores and each.name == system.name]
    own = identity(system)
    values = {name: {str(each.get(name)) for each in alike} for name in own}
    differing = [name for name in own if len(values[name]) > 1 and name not in (*UNNAMED, f"sampling.{axis}")]
    # if every file has its own name, its hash adds nothing
    num_sources = len(values.get("method.source", ()))
    differing = [name for name in differing if not (name.startswith("files.") and len(values[name]) == num_sources)]
    parts = [phrase(name, own[name], values[name]) for name in differing if own[name] is not None]
    return ", ".join([kind_of(system.name).title, *dict.fromkeys(parts)])


def phrase(name: str, value: Any, values: Collection[str]) -> str:
    """A setting, as short as distinguishes it from the other ``values``: a path's end, a hash's beginning."""
    short = name.rpartition(".")[2]
    if name == "method.source" or (isinstance(value, str) and "/" in value):
        return end_of_path(str(value), values)
    if name.startswith("files."):
        value = str(value)[:8]
    return f"{AXES.get(short, short.replace('_', ' '))} {plain_number(value)}"


def end_of_path(path: str, paths: Collection[str]) -> str:
    """The last parts, without suffix, as many as make it differ from the other ``paths``."""
    parts = {each: (*PurePath(each).parts[:-1], PurePath(each).stem) for each in (path, *paths)}
    own = parts.pop(path)
    counts = range(1, len(own))
    count = next((n for n in counts if all(own[-n:] != other[-n:] for other in parts.values())), len(own))
    return "/".join(own[-count:])


def draw(chart: Chart) -> str:
    """The chart as a data URI, the same bytes for the same chart."""
    content = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(5.0, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for number, series in enumerate(chart.series):
            draw_series(axes, series, number)
        axes.set_xlabel(AXIS_TITLES[chart.axis], color=INK)
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
        axes.grid(axis="y", color=LINE)
        axes.locator_params(nbins=6)
        figure.savefig(content, format="svg", metadata={"Date": None})
    return data_uri("svg+xml", content.getvalue())


def draw_series(axes: Axes, series: Series, number: int) -> None:
    """A line with its points, on the band of the confidence intervals."""
    xs = [x for x, _ in series.points]
    lows = [score.value if score.low is None else score.low for _, score in series.points]
    highs = [score.value if score.high is None else score.high for _, score in series.points]
    colour, style = line_style(number)
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.14, linewidth=0)
    axes.plot(xs, [score.value for _, score in series.points], linestyle=style, color=colour, marker="o", linewidth=2)


def line_style(number: int) -> tuple[str, str]:
    """Colour and style; lines beyond the last colour repeat the colours, dashed."""
    return COLOURS[number % len(COLOURS)], "dashed" if number >= len(COLOURS) else "solid"


def describe(chart: Chart) -> str:
    """The values as text, for readers who cannot see the chart."""
    lines = [f"{chart.title}."]
    for series in chart.series:
        lines.append(f"{series.title}: {', '.join(f'{score.value:.3f} at {x:g}' for x, score in series.points)}.")
    return "\n".join(lines)
