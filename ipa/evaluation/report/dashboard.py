"""The report on wandb: the table of scores, and a table of pictures with the image prompts beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ipa.evaluation.report.page import Shown
from ipa.evaluation.report.pictures import choose_items, first_picture
from ipa.evaluation.report.reading import Evaluation, Item
from ipa.evaluation.report.table import Table, make_table

# titles, and a list of values for each row
Rows = tuple[list[str], list[list[Any]]]


def log_report(logger: Any, evaluation: Evaluation, shown: Shown) -> None:
    """Two tables, ``scores`` and ``pictures``, to Lightning's logger of wandb; ends its run."""
    logger.log_hyperparams({"benchmark": dict(evaluation.benchmark), "num_seeds": evaluation.num_seeds})
    for name, (columns, rows) in {
        "scores": score_rows(make_table(evaluation)),
        "pictures": picture_rows(evaluation, shown),
    }.items():
        if rows:
            logger.log_table(name, columns=columns, data=rows)
    logger.experiment.finish()


def score_rows(table: Table) -> Rows:
    """Figures as numbers, so that they can be sorted and drawn; their intervals stand in columns of their own."""
    columns = [*score_columns(table), ("note", [row.note for row in table.rows])]
    return [title for title, _ in columns], [list(row) for row in zip(*[values for _, values in columns], strict=True)]


def score_columns(table: Table) -> Iterator[tuple[str, list[Any]]]:
    """Title and values; None for a figure that is not there, since a column of wandb's has one type."""
    for place, column in enumerate(table.columns):
        cells = [row.cells[place] for row in table.rows]
        yield column.title, [cell.order if column.is_number else cell.text for cell in cells]
        if any(cell.interval for cell in cells):
            yield f"{column.title} interval", [cell.interval for cell in cells]


def picture_rows(evaluation: Evaluation, shown: Shown) -> Rows:
    """The items of the page's grid, each with the first picture of every system that has any."""
    columns = ["item", "caption", "image prompt", *(system.label for system in evaluation.drawn)]
    items = choose_items(evaluation, shown.rows, shown.seed)
    return columns, [list(picture_row(evaluation, item, shown.thumbnail_px)) for item in items]


def picture_row(evaluation: Evaluation, item: Item, edge_px: int) -> Iterator[Any]:
    yield item.id
    yield item.captions[0] if item.captions else ""
    for path in (item.reference, *(first_picture(system, item) for system in evaluation.drawn)):
        yield picture_cell(path, edge_px)


def picture_cell(path: Path | None, edge_px: int) -> Any:
    """A thumbnail as wandb has it in tables; None for a picture that is missing or cannot be read."""
    import wandb

    if path is None:
        return None
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError):
        return None
    small.thumbnail((edge_px, edge_px), Image.Resampling.LANCZOS)
    return wandb.Image(small)
