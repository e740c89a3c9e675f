"""Writes results.json, results.csv, table.md and report.html into a benchmark's folder.

The same input gives the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ipa.evaluation.report.names import kind_of, sorted_metrics
from ipa.evaluation.report.page import make_page, render
from ipa.evaluation.report.pictures import Shown
from ipa.evaluation.report.reading import Evaluation, System, flattened, read_evaluation
from ipa.evaluation.report.table import make_table, paper_values
from ipa.files import write_atomically

PAGE = "report.html"


def write_report(folder: Path, shown: Shown | None = None) -> Path:
    """Write the four files; returns the page's path. Raises UserError before anything is written."""
    evaluation = read_evaluation(folder)
    table = make_table(evaluation)
    contents = {
        "results.json": json.dumps(results(evaluation), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "results.csv": comma_separated(evaluation),
        "table.md": render("table.md.jinja", evaluation, table),
        PAGE: make_page(evaluation, table, shown or Shown()),
    }
    for name, content in contents.items():
        write = partial(Path.write_text, data=content, encoding="utf-8", newline="\n")
        write_atomically(folder / name, write, "make the folder writable")
    return folder / PAGE


def results(evaluation: Evaluation) -> dict[str, Any]:
    """Everything but the values of single items, which each system's scores.json has."""
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
        "paper": paper_values(evaluation, system),
        "settings": dict(system.settings),
        "sha256": dict(system.hashes),
    }


def comma_separated(evaluation: Evaluation) -> str:
    """The same as CSV: a row for every system, a column for every value, such as metrics.clip_i.low."""
    rows = [dict(flattened(system_results(evaluation, system))) for system in evaluation.systems]
    written = io.StringIO()
    writer = csv.DictWriter(written, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()
