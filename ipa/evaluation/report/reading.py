"""Reads and checks a benchmark's folder: its items, and the settings, images and scores of every system.

    FOLDER/items.json, references/ID.png      the benchmark, the same for every system
    FOLDER/LABEL/manifest.json, scores.json   how a system was run, and what its images scored
    FOLDER/LABEL/pictures/ITEM_NUMBER.png     its images

``ipa.evaluation.generation`` and ``scoring`` write it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ipa.errors import UserError
from ipa.evaluation.report.names import rank
from ipa.files import read_json

ITEMS, MANIFEST, SCORES = "items.json", "manifest.json", "scores.json"
COMPLETE = "complete"
NOT_SETTINGS = ("label", "benchmark", "status", "reason", "pictures")  # every other key of a manifest is a setting
NEWER_SAMPLING = {"guidance_rescale": 0.0}  # options that were added later, with what runs without them did
HASH = "sha256 of pictures"
DEVIATION = "_std"  # the value NAME_std is the standard deviation of the value NAME


@dataclass(frozen=True)
class Item:
    """An image prompt; ``reference`` is the path of its thumbnail."""

    id: str
    captions: Sequence[str]
    reference: Path


@dataclass(frozen=True)
class Score:
    """A value with its confidence interval or standard deviation, if known. ``higher``: whether more is better."""

    value: float
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    higher: bool | None = None


@dataclass(frozen=True)
class System:
    """One system's folder, called ``label``. ``settings`` also holds ``method``, ``sampling`` and ``prompt``.

    ``pictures`` has the existing images of each item by number; ``num_planned`` also counts those still to be made.
    ``per_item`` has the values of each metric by item, ``missing`` the reason why a metric has none. A skipped system
    has no images; its ``reason`` says what to download.
    """

    label: str
    status: str
    reason: str
    method: Mapping[str, Any]
    sampling: Mapping[str, Any]
    prompt: str | None
    settings: Mapping[str, Any]
    pictures: Mapping[str, Sequence[Path]]
    num_planned: int = 0
    scores: Mapping[str, Score] = field(default_factory=dict)
    per_item: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.method.get("name") or self.label

    @property
    def num_pictures(self) -> int:
        return sum(map(len, self.pictures.values()))


@dataclass(frozen=True)
class Evaluation:
    """One benchmark with all its systems, in the order of the paper's table."""

    benchmark: Mapping[str, Any]
    num_seeds: int
    items: Sequence[Item]
    systems: Sequence[System]

    @property
    def drawn(self) -> list[System]:
        """The systems that have images."""
        return [system for system in self.systems if system.pictures]

    def pictures_of(self, item: Item) -> list[Path | None]:
        """The image prompt and, for every system in ``drawn``, the item's first image if it exists."""
        return [item.reference, *(next(iter(system.pictures.get(item.id, ())), None) for system in self.drawn)]


def read_evaluation(folder: Path) -> Evaluation:
    """Everything below ``folder`` except the images' content. Raises UserError if that is not one evaluation."""
    check_folder(folder)
    with content_of(folder / ITEMS) as content:
        items = [Item(each["id"], each["captions"], folder / each["reference"]) for each in content["items"]]
        benchmark, num_seeds = content["benchmark"], content["num_seeds"]
        ours = {"name": benchmark["name"], "fingerprint": benchmark["settings"].get("fingerprint")}
    systems = [read_system(each.parent, ours) for each in folder.glob(f"*/{MANIFEST}")]
    if not systems:
        raise UserError(f"folder={folder} has items but no system yet. python evaluate.py method=… adds one.")
    return Evaluation(benchmark, num_seeds, items, sorted(systems, key=order_of))


@contextmanager
def content_of(path: Path) -> Iterator[dict[str, Any]]:
    """The content of a file of evaluate.py; raises UserError, which names it, if what is used inside is not there."""
    content = read_json(path)
    try:
        yield content
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not as evaluate.py writes it ({error!r}): remove it, or its folder") from error


def check_folder(folder: Path) -> None:
    advice = "python evaluate.py … writes one to runs/evaluation/BENCHMARK, or to out=FOLDER."
    if not folder.is_dir():
        raise UserError(f"folder={folder}: no such folder. {advice}")
    if inside := sorted(path.parent for path in folder.glob(f"*/{ITEMS}")):
        names = ", ".join(path.name for path in inside)
        raise UserError(f"folder={folder} holds the benchmarks {names}; report on one at a time: folder={inside[0]}")
    if not (folder / ITEMS).is_file():
        raise UserError(f"folder={folder} holds no evaluation: {ITEMS} is missing. {advice}")


def order_of(system: System) -> tuple[Any, ...]:
    """The paper's order; within one system, empty text first, then by λ, guidance and steps."""
    names = (system.name, str(system.method.get("source")), system.prompt != "empty")
    numbers = (finite(system.sampling.get(axis)) or 0.0 for axis in ("scale", "guidance", "num_steps"))
    return (rank(system.name), *names, *numbers, system.label)


def read_system(folder: Path, ours: Mapping[str, Any]) -> System:
    """Raises UserError for images of another benchmark than ``ours``."""
    with content_of(folder / MANIFEST) as content:
        check_benchmark(content.get("benchmark") or {}, ours, folder / MANIFEST)
        system = system_of(content, folder)
    if system.status != COMPLETE or not (folder / SCORES).is_file():
        return system
    with content_of(folder / SCORES) as content:
        return with_scores(system, content)


def system_of(content: Mapping[str, Any], folder: Path) -> System:
    status, planned = content["status"], content.get("pictures") or []
    pictures: dict[str, list[Path]] = {}
    for each in sorted(planned, key=lambda picture: picture["number"]):
        file = folder / each["file"]
        if status == COMPLETE or file.is_file():
            pictures.setdefault(each["item"], []).append(file)
    settings = {name: value for name, value in content.items() if name not in NOT_SETTINGS}
    sampling = content.get("sampling")
    settings |= {"sampling": {**NEWER_SAMPLING, **sampling}} if sampling else {}
    return System(
        label=folder.name,
        status=status,
        reason=content.get("reason") or "",
        method=content.get("method") or {},
        sampling=settings.get("sampling") or {},
        prompt=content.get("prompt"),
        settings=settings,
        pictures=pictures,
        num_planned=len(planned),
    )


def check_benchmark(named: Mapping[str, Any], ours: Mapping[str, Any], path: Path) -> None:
    """Raises UserError for another name or fingerprint, which changes with any item."""
    differ = [f"{name} {named[name]}, not {ours[name]}" for name in ours if named.get(name, ours[name]) != ours[name]]
    if differ:
        raise UserError(
            f"{path}: its images belong to another benchmark ({'; '.join(differ)}). A folder holds one benchmark with "
            "one choice of items: move this system elsewhere."
        )


def with_scores(system: System, content: Mapping[str, Any]) -> System:
    """``system`` with the ``content`` of its scores file. A value that is not a finite number counts as missing."""
    metrics, scores, missing = content["metrics"], {}, dict(content["missing"])
    for name, entry in metrics.items():
        value = finite(entry["value"])
        if name.endswith(DEVIATION) and name.removesuffix(DEVIATION) in metrics:
            continue
        if value is None:
            missing[name] = "its value is not a finite number"
            continue
        deviation = finite(metrics.get(name + DEVIATION, {}).get("value"))
        low, high = finite(entry.get("low")), finite(entry.get("high"))
        scores[name] = Score(value, low, high, deviation, entry.get("higher_is_better"))
    per_item = {
        name: {item: value for item, value in values.items() if finite(value) is not None}
        for name, values in content["per_item"].items()
    }
    settings = {**system.settings, "metrics": content["settings"], HASH: content["pictures"]}
    return replace(system, settings=settings, scores=scores, per_item=per_item, missing=missing)


def flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values: {"a": {"b": 1}} → a.b, 1."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
