"""What a benchmark's folder holds, checked: items, and for every system its settings, pictures and scores.

    FOLDER/items.json, references/ID.png
    FOLDER/LABEL/manifest.json, scores.json, pictures/ITEM_NUMBER.png

``ipa.evaluation.generation`` and ``scoring`` write it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipa.errors import UserError
from ipa.evaluation.report.paper import rank
from ipa.files import hash_file, read_json

ITEMS, MANIFEST, SCORES = "items.json", "manifest.json", "scores.json"
COMPLETE = "complete"
# what a manifest has besides settings
NO_SETTINGS = ("label", "benchmark", "status", "reason", "pictures")
DEVIATION = "_std"  # ending of a value that is another's deviation


@dataclass(frozen=True)
class Item:
    """An image prompt; ``reference`` is its thumbnail."""

    id: str
    captions: Sequence[str]
    reference: Path


@dataclass(frozen=True)
class Score:
    """A value with its confidence interval, or its deviation, where there is one. ``higher``: more is better."""

    value: float
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    higher: bool | None = None


@dataclass(frozen=True)
class System:
    """One system's folder. ``label`` is the folder's name, ``settings`` its manifest without status and pictures.

    ``pictures`` has each item's files by number, those that are there; ``num_planned`` counts also the others.
    ``per_item`` has each metric's values by item, ``missing`` why a metric has none. A system that was skipped has no
    pictures, and ``reason`` says what to download.
    """

    label: str
    status: str
    reason: str
    settings: Mapping[str, Any]
    pictures: Mapping[str, Mapping[int, Path]]
    num_planned: int = 0
    scores: Mapping[str, Score] = field(default_factory=dict)
    per_item: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> Mapping[str, Any]:
        return self.settings.get("method") or {}

    @property
    def name(self) -> str:
        return self.method.get("name") or self.label

    @property
    def sampling(self) -> Mapping[str, Any]:
        return self.settings.get("sampling") or {}

    @property
    def prompt(self) -> str | None:
        return self.settings.get("prompt")

    @property
    def num_pictures(self) -> int:
        return sum(map(len, self.pictures.values()))


@dataclass(frozen=True)
class Evaluation:
    """One benchmark with all its systems, in the paper's order."""

    benchmark: Mapping[str, Any]
    num_seeds: int
    items: Sequence[Item]
    systems: Sequence[System]

    @property
    def name(self) -> str:
        return str(self.benchmark.get("name", ""))

    @property
    def drawn(self) -> list[System]:
        """The systems that have pictures."""
        return [system for system in self.systems if system.pictures]

    def system(self, label: str) -> System:
        """Raises UserError with the labels that there are."""
        found = {system.label: system for system in self.systems}
        if label not in found:
            raise UserError(f"system={label}: not one of {', '.join(found)}")
        return found[label]


def read_evaluation(folder: Path) -> Evaluation:
    """Everything below ``folder``; pictures stay closed.

    Raises UserError where there is no evaluation, ValueError for several benchmarks and, with its name, for a
    broken file.
    """
    check_folder(folder)
    path = folder / ITEMS
    content = read_json(path)
    items = [read_item(each, path) for each in need(content, "items", list, path)]
    known = {item.id for item in items}
    benchmark = need(content, "benchmark", dict, path)
    found = [read_system(each.parent, known, benchmark) for each in folder.glob(f"*/{MANIFEST}")]
    if not found:
        raise UserError(f"folder={folder}: items, but no system yet. python evaluate.py method=… adds one.")
    systems = sorted(found, key=order_of)
    return Evaluation(benchmark, need(content, "num_seeds", int, path), items, systems)


def check_folder(folder: Path) -> None:
    writes = "python evaluate.py … writes one to runs/evaluation/BENCHMARK, or to where out= says."
    if not folder.is_dir():
        raise UserError(f"folder={folder}: no such folder. {writes}")
    inside = sorted(path.parent for path in folder.glob(f"*/{ITEMS}"))
    if inside:
        names = ", ".join(path.name for path in inside)
        raise UserError(f"folder={folder} holds the benchmarks {names}; a report is about one: folder={inside[0]}")
    if not (folder / ITEMS).is_file():
        raise UserError(f"folder={folder}: no evaluation there, {ITEMS} is missing. {writes}")


def order_of(system: System) -> tuple[Any, ...]:
    """The paper's order; of one system the runs without text first, and small λ, guidance and steps."""
    names = (system.name, str(system.method.get("source")), system.prompt != "empty")
    numbers = (finite(system.sampling.get(axis)) or 0.0 for axis in ("scale", "guidance", "num_steps"))
    return (rank(system.name), *names, *numbers, system.label)


def read_item(content: Any, path: Path) -> Item:
    reference = path.parent / need(content, "reference", str, path)
    return Item(need(content, "id", str, path), content.get("captions") or [], reference)


def read_system(folder: Path, known: set[str], benchmark: Mapping[str, Any]) -> System:
    """``known`` are the benchmark's items; raises UserError for pictures of others, or of another benchmark."""
    path = folder / MANIFEST
    content = read_json(path)
    status = need(content, "status", str, path)
    planned = content.get("pictures") or []
    there = [each for each in planned if status == COMPLETE or (folder / need(each, "file", str, path)).is_file()]
    pictures: dict[str, dict[int, Path]] = {}
    for each in there:
        item, number = need(each, "item", str, path), need(each, "number", int, path)
        pictures.setdefault(item, {})[number] = folder / need(each, "file", str, path)
    check_items({need(each, "item", str, path) for each in planned} - known, path)
    check_benchmark(content.get("benchmark") or {}, benchmark, path)
    settings = {name: value for name, value in content.items() if name not in NO_SETTINGS}
    scores = read_scores(folder / SCORES) if status == COMPLETE else {}
    hashes = {**hashes_of(folder), **scores.pop("hashes", {})}
    settings.update(scores.pop("settings", {}))
    reason = content.get("reason") or ""
    return System(folder.name, status, reason, settings, pictures, len(planned), **scores, hashes=hashes)


def check_items(foreign: set[str], path: Path) -> None:
    if foreign:
        raise UserError(
            f"{path}: {len(foreign)} of its items ({min(foreign)} …) are not in {path.parents[1] / ITEMS}: they are of "
            "another benchmark, or of other settings. A folder holds one benchmark; move it to one of its own."
        )


def check_benchmark(said: Mapping[str, Any], benchmark: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where a manifest says another name or fingerprint: items of two can be named alike."""
    ours = {"name": benchmark.get("name"), "fingerprint": (benchmark.get("settings") or {}).get("fingerprint")}
    differ = [f"{name} {said[name]}, not {ours[name]}" for name in ours if said.get(name, ours[name]) != ours[name]]
    if differ:
        raise UserError(
            f"{path}: its pictures are of another benchmark ({', '.join(differ)}). A folder holds one benchmark; move "
            "it to one of its own."
        )


def read_scores(path: Path) -> dict[str, Any]:
    """What a System has of its scores; empty where it was not scored. A value that is no number counts as missing."""
    if not path.is_file():
        return {}
    content = read_json(path)
    told = need(content, "metrics", dict, path)
    values = {name: finite(need(entry, "value", object, path)) for name, entry in told.items()}
    scores = {name: score_of(name, value, told, values) for name, value in values.items() if value is not None}
    infinite = {name: "its value is not a finite number" for name, value in values.items() if value is None}
    pictures = content.get("pictures")
    return {
        "scores": {name: score for name, score in scores.items() if not deviates(name, values)},
        "missing": {**(content.get("missing") or {}), **infinite},
        "per_item": {name: dict(finite_only(each)) for name, each in (content.get("per_item") or {}).items()},
        "settings": {"metrics": content.get("settings") or content.get("scorer") or {}},
        "hashes": {"pictures": pictures} if pictures else {},
    }


def score_of(name: str, value: float, told: Mapping[str, Any], values: Mapping[str, float | None]) -> Score:
    low, high, higher = (told[name].get(part) for part in ("low", "high", "higher_is_better"))
    return Score(value, finite(low), finite(high), values.get(name + DEVIATION), higher)


def deviates(name: str, values: Mapping[str, Any]) -> bool:
    """Whether the value is the deviation of another."""
    return name.endswith(DEVIATION) and name.removesuffix(DEVIATION) in values


def finite_only(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for item, told in values.items():
        value = finite(told)
        if value is not None:
            yield item, value


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the small files; that of the pictures stands in the scores, as they are too many to be read again."""
    files = [folder / name for name in (MANIFEST, SCORES) if (folder / name).is_file()]
    return {file.name: hash_file(file) for file in files}


def need(content: Any, name: str, kind: type[Any], path: Path) -> Any:
    """The value of that name; raises UserError with the file where it is missing or of another kind."""
    if not isinstance(content, Mapping) or name not in content:
        raise UserError(f"{path}: {name!r} is missing; evaluate.py writes it")
    if not isinstance(content[name], kind):
        raise UserError(f"{path}: {name!r} is a {type(content[name]).__name__}, expected {kind.__name__}")
    return content[name]
