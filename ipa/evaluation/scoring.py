"""The second half of an evaluation: metrics read the written images, so a new metric needs no new images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from ipa.errors import MissingWeights, UserError
from ipa.evaluation.benchmarks import Task
from ipa.evaluation.generation import Read, pictures_hash, read_pictures
from ipa.files import read_json, write_json
from ipa.metrics.bootstrap import confidence_interval
from ipa.metrics.image_metric import ItemMetric
from ipa.types import to_unit_range

BATCH = 50
# by a metric's name in the configuration: its settings, the names of its numbers, or why it is missing
BY_CONFIGURATION = ("settings", "made", "missing")


class NotComputable(Exception):
    """A metric is undefined for these images, such as a distance between sets of one."""


def score(
    folder: Path,
    tasks: Sequence[Task],
    read: Read,
    metrics: DictConfig,
    make: Callable[[DictConfig], Any],
    device: str = "cpu",
) -> dict[str, Any]:
    """Scores of the images in ``folder``; those of the same images in ``scores.json`` are kept.

    ``make`` makes a metric from its configuration. One without weights, or undefined for so few images, is missing.
    """
    path, digest = folder / "scores.json", pictures_hash(folder, tasks)
    settings: Any = OmegaConf.to_container(metrics, resolve=True)  # with the judge
    scores = known_scores(path, digest)
    for name in settings:
        if scores["settings"].get(name) == settings[name] and name not in scores["missing"]:
            continue
        forget(scores, name)
        try:
            metric = make(metrics[name]).to(device)
            found = numbers_of(measured(metric, folder, tasks, read, name), tasks)
        except (MissingWeights, NotComputable) as error:
            scores["missing"][name] = " ".join(str(error).split())
            continue
        scores["settings"][name], scores["made"][name] = settings[name], list(found["metrics"])
        for part, values in found.items():
            scores[part].update(values)
        write_json(path, scores)
    write_json(path, scores)
    return scores


def known_scores(path: Path, digest: str) -> dict[str, Any]:
    """The scores in ``path`` that belong to the images with this hash."""
    empty: dict[str, Any] = {name: {} for name in (*BY_CONFIGURATION, "metrics", "per_item")}
    found = read_json(path) if path.is_file() else {}
    return {"pictures": digest, **empty, **(found if found.get("pictures") == digest else {})}


def forget(scores: dict[str, Any], name: str) -> None:
    """Drop a metric's numbers."""
    for number in scores["made"].get(name, []):
        scores["metrics"].pop(number, None)
        scores["per_item"].pop(number, None)
    for part in BY_CONFIGURATION:
        scores[part].pop(name, None)


def measured(metric: Any, folder: Path, tasks: Sequence[Task], read: Read, name: str) -> Any:
    """The metric, updated with all images, and with the captions if every item has one."""
    captioned = all(task.item.captions for task in tasks)
    for batch, pictures_B3HW in tqdm(
        read_pictures(folder, tasks, BATCH), total=math.ceil(len(tasks) / BATCH), desc=f"{folder.name}: {name}"
    ):
        prompts = {item: to_unit_range(read(item)) for item in {task.item for task in batch}}
        metric.update(
            to_unit_range(pictures_B3HW),
            [prompts[task.item] for task in batch],
            [list(task.item.captions) for task in batch] if captioned else None,
        )
    return metric


def numbers_of(metric: Any, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """A metric's numbers, with intervals over items, whose seeds are not independent. Raises ``NotComputable``."""
    items = [task.item.id for task in tasks]
    try:
        values = metric.compute()
    except UserError as error:
        raise NotComputable(str(error)) from error
    each = metric.per_item() if isinstance(metric, ItemMetric) else {}
    found: dict[str, dict[str, Any]] = {"metrics": {}, "per_item": {}}
    for name, value in values.items():
        entry: dict[str, Any] = {"value": float(value), "higher_is_better": metric.higher.get(name)}
        if name in each:
            interval = confidence_interval(each[name], items)
            entry |= {"low": float(interval.low), "high": float(interval.high)}
            found["per_item"][name] = means(each[name], items)
        found["metrics"][name] = entry
    return found


def means(values_B: Tensor, items: Sequence[str]) -> dict[str, float]:
    """Mean over the images of each item."""
    found: dict[str, list[float]] = {}
    for item, value in zip(items, values_B.tolist(), strict=True):
        found.setdefault(item, []).append(value)
    return {item: sum(values) / len(values) for item, values in found.items()}
