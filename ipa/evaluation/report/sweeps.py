"""Sweeps: runs that differ in λ, guidance or steps and in nothing else, found by their settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ipa.evaluation.report.headings import AXES, PROMPTS, heading, plain_number
from ipa.evaluation.report.paper import kind_of
from ipa.evaluation.report.reading import Evaluation, Score, System

AXES_OF_SWEEPS = ("scale", "guidance", "num_steps")
METRICS_OF_SWEEPS = ("clip_i", "clip_t")
# a run may differ in these and be of the same sweep
NO_DIFFERENCE = ("versions", "device", "seconds", "batch_size", "metrics", "num_seeds")
# what follows from other differences and so need not be told
UNTOLD = ("method.trained", "method.uses_text", "settings._target_")


@dataclass(frozen=True)
class Series:
    """One line: ``points`` are (value of the axis, score), by value; at least two values."""

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
    """All that the runs allow, those against λ first."""
    found = []
    for axis in AXES_OF_SWEEPS:
        groups = sweeps(evaluation.systems, axis)
        for metric in METRICS_OF_SWEEPS:
            series = list(series_of(groups, evaluation.systems, axis, metric))
            if series:
                found.append(Chart(axis, metric, series))
    return found


def sweeps(systems: Sequence[System], axis: str) -> list[list[System]]:
    """Groups of runs that differ in ``axis`` alone, and do differ in it."""
    groups: dict[str, list[System]] = {}
    for system in systems:
        if system.scores and system.sampling.get(axis) is not None:
            others = {name: value for name, value in identity(system).items() if name != f"sampling.{axis}"}
            groups.setdefault(json.dumps(others, sort_keys=True), []).append(system)
    return [group for group in groups.values() if len({each.sampling[axis] for each in group}) > 1]


def identity(system: System) -> dict[str, Any]:
    """Dotted name → value of all that makes a run's pictures; 2 and 2.0 are the same guidance."""
    kept = {name: value for name, value in system.settings.items() if name not in NO_DIFFERENCE}
    return {name: float(value) if type(value) is int else value for name, value in flattened(kept)}


def flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def series_of(
    groups: Sequence[Sequence[System]], systems: Sequence[System], axis: str, metric: str
) -> Iterator[Series]:
    for group in groups:
        points = [(float(each.sampling[axis]), each.scores[metric]) for each in group if metric in each.scores]
        if len({place for place, _ in points}) > 1:
            ordered = sorted(points, key=lambda point: (point[0], point[1].value))
            yield Series(title_of(group[0], systems, axis), ordered)


def title_of(system: System, systems: Sequence[System], axis: str) -> str:
    """The system, and what tells this run from the others of the same system, whatever their ``axis``."""
    alike = [identity(each) for each in systems if each.scores and each.name == system.name]
    own = identity(system)
    values = {name: {str(each.get(name)) for each in alike} for name in own}
    differing = [name for name in own if len(values[name]) > 1 and name not in (*UNTOLD, f"sampling.{axis}")]
    # where each file has a name of its own, its hash says nothing more
    paths = len(values.get("method.source", ()))
    differing = [name for name in differing if not (name.startswith("files.") and len(values[name]) == paths)]
    parts = [phrase(name, own[name], values[name]) for name in differing if own[name] is not None]
    return ", ".join([kind_of(system.name).title, *dict.fromkeys(parts)])


def phrase(name: str, value: Any, values: Collection[str]) -> str:
    """A setting as short as tells it from the other ``values``: of a path its end, of a hash its beginning."""
    short = name.rpartition(".")[2]
    if name == "prompt":
        return PROMPTS.get(str(value), str(value))
    if name == "method.source" or (isinstance(value, str) and "/" in value):
        return end_of_path(str(value), values)
    if name.startswith("files."):
        value = str(value)[:8]
    return f"{AXES.get(short, short.replace('_', ' '))} {plain_number(value)}"


def end_of_path(path: str, paths: Collection[str]) -> str:
    """Its last parts, without suffix, as many as none of the other ``paths`` ends with."""
    own, others = parts_of(path), [parts_of(other) for other in paths if other != path]
    for count in range(1, len(own)):
        if all(other[-count:] != own[-count:] for other in others):
            return "/".join(own[-count:])
    return "/".join(own)


def parts_of(path: str) -> tuple[str, ...]:
    return (*PurePath(path).parts[:-1], PurePath(path).stem)
