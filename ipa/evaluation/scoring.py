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

from ipa.evaluation.generation import pictures_hash, read_pictures, write_json
from ipa.evaluation.items import Item, Task
from ipa.metrics.bootstrap import confidence_interval
from ipa.metrics.picture_metric import ItemMetric
from ipa.types import to_unit_range

BATCH = 50


def score(
    folder: Path,
    tasks: Sequence[Task],
    read: Callable[[Item], Tensor],
    metrics: Mapping[str, Callable[[], Any]],
    settings: Mapping[str, Any],
    device: str = "cpu",
) -> dict[str, Any]:
    """Scores of the pictures in ``folder``, kept in ``scores.json``: what is there for these very pictures stays.

    ``metrics`` make a metric by the name of its configuration; one whose network cannot be had is noted as missing.
    """
    path, digest = folder / "scores.json", pictures_hash(folder, tasks)
    asked = {name: json.loads(json.dumps(settings.get(name))) for name in metrics}
    scores = known_scores(path, digest)
    for name, make in metrics.items():
        if scores["settings"].get(name) == asked[name] and name not in scores["missing"]:
            continue
        try:
            metric = make().to(device)
        except OSError as error:
            scores["missing"][name] = " ".join(str(error).split())
            continue
        scores["missing"].pop(name, None)
        scores["settings"][name] = asked[name]
        add(scores, metric, measured(metric, folder, tasks, read, name), tasks)
        write_json(path, scores)
    write_json(path, scores)
    return scores


def known_scores(path: Path, digest: str) -> dict[str, Any]:
    """What ``path`` holds of the pictures with this hash."""
    empty: dict[str, Any] = {"pictures": digest, "settings": {}, "metrics": {}, "per_item": {}, "missing": {}}
    if not path.is_file():
        return empty
    found = json.loads(path.read_text())
    return found if found["pictures"] == digest else empty


def measured(metric: Any, folder: Path, tasks: Sequence[Task], read: Callable[[Item], Tensor], name: str) -> Any:
    """The metric, updated with all pictures, and with the captions if every item has some."""
    number = 0
    captioned = all(task.item.captions for task in tasks)
    for batch, pictures_B3HW in tqdm(
        read_pictures(folder, tasks, BATCH), total=math.ceil(len(tasks) / BATCH), desc=f"{folder.name}: {name}"
    ):
        metric.update(
            to_unit_range(pictures_B3HW),
            [to_unit_range(read(task.item)) for task in batch],
            [list(task.item.captions) for task in batch] if captioned else None,
            torch.arange(number, number + len(batch)),
        )
        number += len(batch)
    return metric


def add(scores: dict[str, Any], metric: Any, filled: Any, tasks: Sequence[Task]) -> None:
    """Note a metric's numbers; intervals are over items, the seeds of one belonging together."""
    items = [task.item.id for task in tasks]
    values = filled.compute()
    each = filled.per_item() if isinstance(metric, ItemMetric) else {}
    for name, value in values.items():
        entry: dict[str, Any] = {"value": float(value), "higher_is_better": metric.higher.get(name)}
        if name in each:
            interval = confidence_interval(each[name], items)
            entry |= {"low": float(interval.low), "high": float(interval.high)}
            scores["per_item"][name] = means(each[name], items)
        scores["metrics"][name] = entry


def means(values_B: Tensor, items: Sequence[str]) -> dict[str, float]:
    """Mean over the pictures of each item."""
    found: dict[str, list[float]] = {}
    for item, value in zip(items, values_B.tolist(), strict=True):
        found.setdefault(item, []).append(value)
    return {item: sum(values) / len(values) for item, values in found.items()}
