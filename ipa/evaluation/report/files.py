"""A benchmark's folder → results.json, results.csv, table.md and report.html in it, the same for the same input."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ipa.evaluation.report.headings import sorted_metrics
from ipa.evaluation.report.markdown import markdown
from ipa.evaluation.report.page import Shown, make_page
from ipa.evaluation.report.paper import is_papers_benchmark, is_papers_protocol, kind_of, paper_row
from ipa.evaluation.report.reading import Evaluation, System, read_evaluation
from ipa.evaluation.report.table import make_table
from ipa.files import write_atomically

PAGE = "report.html"


def write_report(folder: Path, shown: Shown | None = None) -> Path:
    """Merge what is there and write the four files; returns the page's path.

    Raises UserError, with a message for the user, before anything is written.
    """
    evaluation = read_evaluation(folder)
    table = make_table(evaluation)
    contents = {
        "results.json": json.dumps(results(evaluation), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "results.csv": comma_separated(evaluation),
        "table.md": markdown(evaluation, table),
        PAGE: make_page(evaluation, table, shown or Shown()),
    }
    for name, content in contents.items():
        write_atomically(folder / name, partial(write_text, content), "make the folder writable")
    return folder / PAGE


def write_text(content: str, path: Path) -> None:
    path.write_text(content, encoding="utf-8", newline="\n")


def results(evaluation: Evaluation) -> dict[str, Any]:
    """All but the values of single items, which stay in each system's scores.json."""
    return {
        "benchmark": dict(evaluation.benchmark),
        "num_items": len(evaluation.items),
        "num_seeds": evaluation.num_seeds,
        "systems": [system_results(evaluation, system) for system in evaluation.systems],
    }


def system_results(evaluation: Evaluation, system: System) -> dict[str, Any]:
    return {
        "label": system.label,
        "title": kind_of(system.name).title,
        "status": system.status,
        "reason": system.reason,
        "num_pictures": system.num_pictures,
        "metrics": {name: asdict(system.scores[name]) for name in sorted_metrics(set(system.scores))},
        "missing": dict(system.missing),
        "paper": paper_results(evaluation, system),
        "settings": dict(system.settings),
        "sha256": dict(system.hashes),
    }


def paper_results(evaluation: Evaluation, system: System) -> dict[str, float] | None:
    """The paper's figures for the same question, None where ours is another."""
    row = paper_row(system.name, system.method.get("trained"))
    same = is_papers_benchmark(evaluation.name, len(evaluation.items), evaluation.num_seeds)
    if row is None or not same or not is_papers_protocol(system.sampling, system.prompt):
        return None
    return {"clip_score": row.clip_score, "clip_i": row.clip_i}


def comma_separated(evaluation: Evaluation) -> str:
    """A row for every system, three columns for every metric: value, low, high."""
    metrics = sorted_metrics({name for system in evaluation.systems for name in system.scores})
    rows = [csv_row(evaluation, system, metrics) for system in evaluation.systems]
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def csv_row(evaluation: Evaluation, system: System, metrics: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"label": system.label, "system": kind_of(system.name).title, "status": system.status}
    row |= {name: system.method.get(name) for name in ("source", "trained", "uses_text")}
    row |= {name: system.sampling.get(name) for name in ("scale", "guidance", "num_steps", "image_size_px")}
    row |= {"prompt": system.prompt, "seed": system.settings.get("seed"), "pictures": system.num_pictures}
    for name in metrics:
        score = system.scores.get(name)
        row |= {name: score and score.value, f"{name}_low": score and score.low, f"{name}_high": score and score.high}
    paper: Mapping[str, Any] = paper_results(evaluation, system) or {}
    return row | {f"{name}_paper": paper.get(name) for name in ("clip_score", "clip_i")} | {"reason": system.reason}
