"""Curves of CLIP-I and CLIP-T against λ, guidance or steps.

Drawn as SVG by hand: colours come from the page's style, so that a curve is readable on light and on dark ground.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ipa.evaluation.report.elements import Html, element, join
from ipa.evaluation.report.headings import AXES, heading
from ipa.evaluation.report.reading import Score
from ipa.evaluation.report.sweeps import Chart, Series

AXIS_TITLES = {"scale": "λ, the image prompt's weight", "guidance": "guidance", "num_steps": "number of steps"}
NUM_COLOURS = 8
WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 46


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers in [low, high], about as many as asked: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 10) for place in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
    """From values to the drawing's points."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @classmethod
    def around(cls, chart: Chart) -> Frame:
        points = [point for series in chart.series for point in series.points]
        xs = [place for place, _ in points]
        ys = [bound for _, score in points for bound in bounds(score)]
        margin = max(0.08 * (max(ys) - min(ys)), 0.005)
        return cls(min(xs), max(xs), min(ys) - margin, max(ys) + margin)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - BOTTOM - TOP)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def bounds(score: Score) -> tuple[float, float]:
    if score.low is None or score.high is None:
        return score.value, score.value
    return score.low, score.high


def draw(chart: Chart) -> Html:
    """The chart with its legend, as a figure."""
    frame = Frame.around(chart)
    lines = [draw_series(chart, series, place, frame) for place, series in enumerate(chart.series)]
    picture = element(
        "svg",
        draw_grid(chart, frame),
        *lines,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=chart.title,
    )
    return element("figure", element("figcaption", chart.title), picture, draw_legend(chart), class_="chart")


def draw_grid(chart: Chart, frame: Frame) -> Html:
    parts = []
    for value in ticks(frame.y_low, frame.y_high):
        y = f"{frame.y(value):.1f}"
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", f"{value:g}", x=LEFT - 8, y=y, dy="0.32em", text_anchor="end"))
    for value in ticks(frame.x_low, frame.x_high):
        x = f"{frame.x(value):.1f}"
        parts.append(element("text", f"{value:g}", x=x, y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    base = HEIGHT - BOTTOM
    parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(element("text", AXIS_TITLES[chart.axis], x=middle, y=HEIGHT - 8, text_anchor="middle"))
    return join(parts)


def draw_series(chart: Chart, series: Series, place: int, frame: Frame) -> Html:
    """Interval, line, and points that tell their figures to a pointer resting on them."""
    band = [(x, bounds(score)[0]) for x, score in series.points]
    band += [(x, bounds(score)[1]) for x, score in reversed(series.points)]
    line = frame.path([(x, score.value) for x, score in series.points])
    parts = [
        element("polygon", points=frame.path(band), class_="band"),
        element("polyline", points=line, class_=f"line{' dashed' * (place >= NUM_COLOURS)}"),
    ]
    for x, score in series.points:
        told = element("title", f"{series.title}\n{AXES[chart.axis]} {x:g}: {told_value(chart.metric, score)}")
        centre = {"cx": f"{frame.x(x):.1f}", "cy": f"{frame.y(score.value):.1f}"}
        parts.append(element("circle", told, **centre, r=4.5))
    return element("g", *parts, class_=colour(place))


def told_value(metric: str, score: Score) -> str:
    digits = heading(metric).digits
    low, high = bounds(score)
    interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if low < high else ""
    return f"{score.value:.{digits}f}{interval}"


def draw_legend(chart: Chart) -> Html:
    """Names of the lines, also of a single one: the title does not say which system it is."""
    entries = []
    for place, series in enumerate(chart.series):
        key = element("span", class_=f"key {colour(place)}{' dashed' * (place >= NUM_COLOURS)}")
        entries.append(element("li", key, series.title))
    return element("ul", *entries, class_="legend")


def colour(place: int) -> str:
    return f"s{place % NUM_COLOURS}"
