"""The second half of an evaluation: metrics read the written pictures. A new metric makes no picture anew.

FOLDER/LABEL/scores.json     per metric its mean with a confidence interval, per item, or why it is missing
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ipa.errors import UserError
from ipa.evaluation.generation import pictures_hash, read_json, read_pictures, write_json
from ipa.evaluation.items import Item, Task
from ipa.metrics.bootstrap import confidence_interval
from ipa.metrics.picture_metric import ItemMetric
from ipa.types import to_unit_range

BATCH = 50
# metrics by their configuration's name: what they were made with, which numbers they gave, or why they gave none
BY_CONFIGURATION = ("settings", "made", "missing")


class TooFew(UserError):
    """What a metric says of pictures that it cannot be told of, such as a distance between sets of one."""


def score(
    folder: Path,
    tasks: Sequence[Task],
    read: Callable[[Item], Tensor],
    metrics: Mapping[str, Callable[[], Any]],
    settings: Mapping[str, Any],
    device: str = "cpu",
) -> dict[str, Any]:
    """Scores of the pictures in ``folder``, kept in ``scores.json``: what is there for these very pictures stays.

    ``metrics`` make a metric by the name of its configuration, ``settings`` say with what networks and options. One
    whose network cannot be had, or that cannot be had of so few pictures, is noted as missing.
    """
    path, digest = folder / "scores.json", pictures_hash(folder, tasks)
    asked = {name: json.loads(json.dumps(settings.get(name))) for name in metrics}
    scores = known_scores(path, digest)
    for name, make in metrics.items():
        if scores["settings"].get(name) == asked[name] and name not in scores["missing"]:
            continue
        forget(scores, name)
        try:
            metric = make().to(device)
            found = numbers_of(metric, measured(metric, folder, tasks, read, name), tasks)
        except (OSError, TooFew) as error:
            scores["missing"][name] = " ".join(str(error).split())
            continue
        scores["settings"][name], scores["made"][name] = asked[name], list(found["metrics"])
        for part, values in found.items():
            scores[part].update(values)
        write_json(path, scores)
    write_json(path, scores)
    return scores


def known_scores(path: Path, digest: str) -> dict[str, Any]:
    """What ``path`` holds of the pictures with this hash."""
    empty: dict[str, Any] = {name: {} for name in (*BY_CONFIGURATION, "metrics", "per_item")}
    found = read_json(path) if path.is_file() else {}
    return {"pictures": digest, **empty, **(found if found.get("pictures") == digest else {})}


def forget(scores: dict[str, Any], name: str) -> None:
    """Drop the numbers of a metric that was made with other settings."""
    for number in scores["made"].get(name, []):
        scores["metrics"].pop(number, None)
        scores["per_item"].pop(number, None)
    for part in BY_CONFIGURATION:
        scores[part].pop(name, None)


def measured(metric: Any, folder: Path, tasks: Sequence[Task], read: Callable[[Item], Tensor], name: str) -> Any:
    """The metric, updated with all pictures, and with the captions if every item has some."""
    number = 0
    captioned = all(task.item.captions for task in tasks)
    for batch, pictures_B3HW in tqdm(
        read_pictures(folder, tasks, BATCH), total=math.ceil(len(tasks) / BATCH), desc=f"{folder.name}: {name}"
    ):
        prompts = {item: to_unit_range(read(item)) for item in {task.item for task in batch}}  # once for all its seeds
        metric.update(
            to_unit_range(pictures_B3HW),
            [prompts[task.item] for task in batch],
            [list(task.item.captions) for task in batch] if captioned else None,
            torch.arange(number, number + len(batch)),
        )
        number += len(batch)
    return metric


def numbers_of(metric: Any, filled: Any, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """A metric's numbers; intervals are over items, the seeds of one belonging together. Raises ``TooFew``."""
    items = [task.item.id for task in tasks]
    try:
        values = filled.compute()
    except ValueError as error:
        raise TooFew(str(error)) from error
    each = filled.per_item() if isinstance(metric, ItemMetric) else {}
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
    """Mean over the pictures of each item."""
    found: dict[str, list[float]] = {}
    for item, value in zip(items, values_B.tolist(), strict=True):
        found.setdefault(item, []).append(value)
    return {item: sum(values) / len(values) for item, values in found.items()}
