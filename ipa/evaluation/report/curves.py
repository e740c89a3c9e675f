"""Curves over sweeps (runs that differ only in λ, in guidance or in steps), and bars of the attention to the image.

Charts contain no text of the user's, in which matplotlib would read ``$`` as mathematics.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ipa.evaluation.report.names import AXES, heading, kind_of, plain
from ipa.evaluation.report.reading import HASH, Evaluation, Score, System, finite, flattened

SWEPT_AXES = ("scale", "guidance", "num_steps")
SWEPT_METRICS = ("clip_i", "clip_t")
# runs of one sweep may differ in these
NO_DIFFERENCE = ("versions", "device", "seconds", "batch_size", "metrics", "num_seeds", HASH)

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
        groups = sweeps(evaluation.systems, axis)
        for metric in SWEPT_METRICS:
            series = []
            for title, group in zip(titles_of(groups), groups, strict=True):
                points = [(float(each.sampling[axis]), each.scores[metric]) for each in group if metric in each.scores]
                if len({x for x, _ in points}) > 1:
                    series.append(Series(title, sorted(points, key=lambda point: (point[0], point[1].value))))
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


def titles_of(groups: Sequence[Sequence[System]]) -> list[str]:
    """Each system with the parts that the labels of its runs share; all labels if these parts say too little."""
    titles = [", ".join([kind_of(group[0].name).title, *filter(None, [shared_label(group)])]) for group in groups]
    listed = [", ".join([kind_of(group[0].name).title, *(each.label for each in group)]) for group in groups]
    return [each if titles.count(title) > 1 else title for title, each in zip(titles, listed, strict=True)]


def shared_label(group: Sequence[System]) -> str:
    """``simple_global`` of ip_adapter-simple_global-scale0 and ip_adapter-simple_global-scale1."""
    first, *others = [each.label.split("-") for each in group]
    return "-".join(part for part in first if part != plain(group[0].name) and all(part in other for other in others))


def draw(chart: Chart) -> str:
    """The chart as a data URI, the same bytes for the same chart."""

    def plot(axes: Axes) -> None:
        for number, series in enumerate(chart.series):
            draw_series(axes, series, number)
        axes.set_xlabel(AXIS_TITLES[chart.axis], color=INK)
        axes.grid(axis="y", color=LINE)
        axes.locator_params(nbins=6)

    return drawn(3.0, plot)


def drawn(height: float, plot: Callable[[Axes], None]) -> str:
    """What ``plot`` draws, as a data URI; 5 inches wide."""
    content = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(5.0, height), layout="constrained")
        axes = figure.add_subplot()
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
        plot(axes)
        figure.savefig(content, format="svg", metadata={"Date": None})
    return data_uri("svg+xml", content.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


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


def find_bars(evaluation: Evaluation) -> list[tuple[System, str, str]]:
    """‖λ · image attention‖ / ‖text attention‖ by block for each adapter: a system, bars as a URI, and in words."""
    found: dict[str, tuple[System, str, str]] = {}
    for system in evaluation.systems:
        entries = (system.method.get("image_attention") or {}).items()
        ratios = {str(block): ratio for block, value in entries if (ratio := finite(value)) is not None}
        if ratios and str(ratios) not in found:
            words = ", ".join(f"{block} {ratio:.2f}" for block, ratio in ratios.items())
            found[str(ratios)] = system, draw_bars(ratios), words
    return list(found.values())


def draw_bars(ratios: Mapping[str, float]) -> str:
    """A horizontal bar per block, the first on top; the line at 1 is where the image outweighs the text."""

    def plot(axes: Axes) -> None:
        axes.barh([name.replace("$", "") for name in ratios], list(ratios.values()), color=COLOURS[0], height=0.7)
        axes.axvline(1, color=INK, linestyle="dotted", linewidth=1)
        axes.invert_yaxis()
        axes.grid(axis="x", color=LINE)

    return drawn(0.6 + 0.25 * len(ratios), plot)
