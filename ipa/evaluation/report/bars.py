"""Bars of how much each block of a base attends to the image, as the training of an adapter measured it last."""

from __future__ import annotations

import io
from collections.abc import Mapping

from matplotlib import rc_context
from matplotlib.figure import Figure

from ipa.evaluation.report.curves import COLOURS, INK, LINE, STYLE
from ipa.evaluation.report.pictures import data_uri
from ipa.evaluation.report.reading import Evaluation, System, finite


def find_bars(evaluation: Evaluation) -> list[tuple[System, str, str]]:
    """Systems that have the ratios, each adapter once, with the bars as a data URI and in words."""
    systems: dict[tuple[tuple[str, float], ...], System] = {}
    for system in evaluation.systems:
        if ratios := ratios_of(system):
            systems.setdefault(tuple(ratios.items()), system)
    return [(system, draw_bars(dict(ratios)), in_words(dict(ratios))) for ratios, system in systems.items()]


def ratios_of(system: System) -> dict[str, float]:
    """‖λ · image attention‖ / ‖text attention‖ by block, in the order of the manifest."""
    found = system.method.get("image_attention")
    entries = found.items() if isinstance(found, Mapping) else ()
    return {str(block): ratio for block, value in entries if (ratio := finite(value)) is not None}


def draw_bars(ratios: Mapping[str, float]) -> str:
    """A horizontal bar per block, the first on top; the line at 1 is where the image outweighs the text."""
    content = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(5.0, 0.6 + 0.25 * len(ratios)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh([name.replace("$", "") for name in ratios], list(ratios.values()), color=COLOURS[0], height=0.7)
        axes.axvline(1, color=INK, linestyle="dotted", linewidth=1)
        axes.invert_yaxis()
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
        axes.grid(axis="x", color=LINE)
        figure.savefig(content, format="svg", metadata={"Date": None})
    return data_uri("svg+xml", content.getvalue())


def in_words(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{block} {ratio:.2f}" for block, ratio in ratios.items())
