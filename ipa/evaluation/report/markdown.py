"""The table as markdown, for a README or an issue."""

from __future__ import annotations

from ipa.evaluation.report.reading import Evaluation
from ipa.evaluation.report.table import Cell, Column, Table, missing_lines, summary


def markdown(evaluation: Evaluation, table: Table) -> str:
    """The table with its notes, for a README or an issue."""
    parts = [
        f"# Evaluation: {evaluation.name}",
        summary(evaluation),
        markdown_table(table),
        "\n".join(f"* **{column.title}**: {column.about}." for column in table.columns if column.about),
        *markdown_missing(table),
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    noted = any(row.note for row in table.rows)
    columns = list(table.columns) + ([Column("note", lambda system: Cell(""))] if noted else [])
    lines = [[column.title for column in columns], ["--:" if column.is_number else "---" for column in columns]]
    lines += [[markdown_cell(cell) for cell in (*row.cells, *[Cell(row.note)][: int(noted)])] for row in table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_cell(cell: Cell) -> str:
    words = escaped(cell.text)
    value = f"**{words}**" if cell.is_best else words
    return f"{value} {cell.interval}" if cell.interval else value


def escaped(words: str) -> str:
    return " ".join(words.replace("|", "\\|").split())


def markdown_missing(table: Table) -> list[str]:
    lines = [f"* **{title}**: {escaped(reason)}" for title, reason in missing_lines(table)]
    return ["Without figures:\n\n" + "\n".join(lines)] if lines else []
