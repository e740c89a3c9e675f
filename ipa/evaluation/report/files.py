"""Writes table.md and report.html into a benchmark's folder, or tables to wandb; the same bytes for the same input."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ipa.evaluation.report.page import Shown, choose_items, make_page, read_thumbnail, render
from ipa.evaluation.report.reading import Evaluation, read_evaluation
from ipa.evaluation.report.table import Table, make_table
from ipa.files import write_atomically

PAGE = "report.html"
# titles, and a list of values for each row
Rows = tuple[list[str], list[list[Any]]]


def write_report(folder: Path, shown: Shown | None = None) -> Path:
    """Write the two files; returns the page's path. Raises UserError before anything is written."""
    evaluation = read_evaluation(folder)
    table = make_table(evaluation)
    contents = {
        "table.md": render("table.md.jinja", evaluation, table),
        PAGE: make_page(evaluation, table, shown or Shown()),
    }
    for name, content in contents.items():
        write = partial(Path.write_text, data=content, encoding="utf-8", newline="\n")
        write_atomically(folder / name, write, "make the folder writable")
    return folder / PAGE


def log_report(logger: Any, evaluation: Evaluation, shown: Shown) -> None:
    """Log the tables ``scores`` and ``pictures`` to Lightning's wandb logger and finish its run."""
    logger.log_hyperparams({"benchmark": dict(evaluation.benchmark), "num_seeds": evaluation.num_seeds})
    tables = {"scores": score_rows(make_table(evaluation)), "pictures": picture_rows(evaluation, shown)}
    for name, (columns, rows) in tables.items():
        if rows:
            logger.log_table(name, columns=columns, data=rows)
    logger.experiment.finish()


def score_rows(table: Table) -> Rows:
    """Scores are numbers, None if missing, so that wandb can sort and plot them; intervals have their own columns."""
    columns: dict[str, list[Any]] = {}
    for column in table.columns:
        columns[column.title] = [cell.order if column.is_number else cell.text for cell in column.cells]
        if any(cell.interval for cell in column.cells):
            columns[f"{column.title} interval"] = [cell.interval for cell in column.cells]
    columns["note"] = list(table.notes)
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def picture_rows(evaluation: Evaluation, shown: Shown) -> Rows:
    """The items of the page's grid, each with the first image of every system that has any."""
    import wandb

    rows: list[list[Any]] = []
    for item in choose_items(evaluation, shown.rows, shown.seed):
        images = [read_thumbnail(path, shown.thumbnail_px) for path in evaluation.pictures_of(item)]
        rows.append([item.id, "".join(item.captions[:1]), *(image and wandb.Image(image) for image in images)])
    return ["item", "caption", "image prompt", *(system.label for system in evaluation.drawn)], rows
