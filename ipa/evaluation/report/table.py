"""The table of scores: a row for every system, the columns of the paper's Table 1 and our metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ipa.evaluation.report.names import AXES, heading, kind_of, paper_row, plain_number, sorted_metrics
from ipa.evaluation.report.reading import COMPLETE, Evaluation, System

FLAGS = {True: "✓", False: "✗", None: ""}
ARROWS = {True: " ↑", False: " ↓", None: ""}
# the paper's benchmark (name, items, images per item) and settings
PAPER_BENCHMARK = ("coco2017", 5000, 4)
PAPER_SETTINGS = {"prompt": "empty", "scale": 1.0, "guidance": 7.5, "guidance_rescale": 0.0, "num_steps": 50}
# metric, as it is called in a PaperRow → title of the column with the paper's values
PAPERS = {"clip_score": "CLIP-T, paper", "clip_i": "CLIP-I, paper"}


@dataclass(frozen=True)
class Cell:
    """``order`` is the sort key, None sorts last; ``interval`` is printed after ``text``; ``why`` explains a gap."""

    text: str
    order: float | str | None = None
    interval: str = ""
    why: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Column:
    """A cell for every system, in the evaluation's order."""

    title: str
    cells: Sequence[Cell]
    about: str = ""
    is_number: bool = False
    is_flag: bool = False
    is_metric: bool = False


@dataclass(frozen=True)
class Table:
    """``notes`` has one text for every system: why it has no scores, empty for one that has some."""

    systems: Sequence[System]
    columns: Sequence[Column]
    notes: Sequence[str]


def make_table(evaluation: Evaluation) -> Table:
    """Columns without any text are left out."""
    columns = [column for column in all_columns(evaluation) if any(cell.text for cell in column.cells)]
    return Table(evaluation.systems, columns, [note_on(each) for each in evaluation.systems])


def all_columns(evaluation: Evaluation) -> Iterator[Column]:
    systems = evaluation.systems
    kinds = [kind_of(system.name) for system in systems]
    yield Column("system", texts(kind.title for kind in kinds))
    yield Column("run", texts(system.label for system in systems), "the folder of its images")
    yield from setting_columns(systems)
    frozen, text = [kind.frozen_base for kind in kinds], [each.method.get("uses_text") for each in systems]
    yield flag_column("custom models", frozen, "works with models fine-tuned from the same base")
    yield flag_column("structure tools", frozen, "works with structure controls such as ControlNet")
    yield flag_column("text too", text, "takes a text prompt with the image prompt")
    yield Column("trained", [trained(each) for each in systems], "parameters trained for image prompts", is_number=True)
    yield from metric_columns(evaluation)


def flag_column(title: str, flags: Iterable[bool | None], about: str) -> Column:
    return Column(title, texts(FLAGS[flag] for flag in flags), about, is_flag=True)


def texts(values: Iterable[str]) -> list[Cell]:
    return [Cell(value, value or None) for value in values]


def setting_columns(systems: Sequence[System]) -> Iterator[Column]:
    """The sampling options in which the systems differ."""
    for axis, title in AXES.items():
        if len({each.sampling.get(axis) for each in systems if each.sampling}) > 1:
            values = [each.sampling.get(axis) for each in systems]
            cells = [Cell("" if value is None else plain_number(value), value) for value in values]
            yield Column(title, cells, is_number=True)
    if len({each.prompt for each in systems if each.prompt}) > 1:
        yield Column("text", texts(each.prompt or "" for each in systems), "the text prompt that the systems got")


def trained(system: System) -> Cell:
    """Our count, else the paper's if it has a single one for this system."""
    counted = system.method.get("trained")
    if counted is not None:
        return Cell(f"{counted / 1e6:.1f} M" if counted >= 1e6 else f"{counted:,}", counted)
    row = paper_row(system.name, None)
    return Cell(f"{row.trained} M", row.trained * 1e6, "(paper)") if row else Cell("")


def metric_columns(evaluation: Evaluation) -> Iterator[Column]:
    systems = evaluation.systems
    papers = [paper_values(evaluation, system) for system in systems]
    for name in sorted_metrics({name for system in systems for name in system.scores}):
        yield metric_column(systems, name)
        if name in PAPERS:
            cells = [Cell(f"{values[name]:.3f}", values[name]) if values else Cell("") for values in papers]
            yield Column(PAPERS[name], cells, "Ye et al. 2023, Table 1", is_number=True)


def metric_column(systems: Sequence[System], name: str) -> Column:
    """The best of at least two values is marked."""
    found = [system.scores[name] for system in systems if name in system.scores]
    higher, values = found[0].higher, [score.value for score in found]
    best = None if higher is None or len(found) < 2 else max(values) if higher else min(values)
    cells = [metric_cell(each, name, best) for each in systems]
    about = heading(name)
    return Column(about.title + ARROWS[higher], cells, about.about, is_number=True, is_metric=True)


def metric_cell(system: System, name: str, best: float | None) -> Cell:
    score = system.scores.get(name)
    if score is None:
        return Cell("–", why=system.missing.get(name) or note_on(system) or "not computed in this run")
    digits, interval = heading(name).digits, ""
    if score.low is not None and score.high is not None:
        interval = f"[{score.low:.{digits}f}, {score.high:.{digits}f}]"
    elif score.deviation is not None:
        interval = f"± {score.deviation:.{digits}f}"
    return Cell(f"{score.value:.{digits}f}", score.value, interval, is_best=score.value == best)


def paper_values(evaluation: Evaluation, system: System) -> dict[str, float]:
    """By metric, for a system with the paper's benchmark and settings, or one that was never run; else empty."""
    benchmark = (evaluation.benchmark.get("name"), len(evaluation.items), evaluation.num_seeds)
    settings = {**system.sampling, "prompt": system.prompt}
    same = not system.sampling or all(settings.get(name) == value for name, value in PAPER_SETTINGS.items())
    row = paper_row(system.name, system.method.get("trained")) if benchmark == PAPER_BENCHMARK and same else None
    return {name: getattr(row, name) for name in PAPERS} if row else {}


def note_on(system: System) -> str:
    if system.status == COMPLETE:
        return "" if system.scores or system.missing else "not scored yet"
    return f"{system.status}: {system.reason or f'{system.num_pictures} of {system.num_planned} images exist'}"


def missing_lines(systems: Sequence[System]) -> Iterator[tuple[str, str]]:
    """A metric's title and why it has no values, with the labels unless that holds for all scored systems."""
    scored = [system for system in systems if system.scores or system.missing]
    for name in sorted_metrics({name for system in systems for name in system.missing}):
        reasons = dict.fromkeys(system.missing[name] for system in scored if name in system.missing)
        for reason in reasons:
            labels = [system.label for system in scored if system.missing.get(name) == reason]
            yield heading(name).title, reason if len(labels) == len(scored) else f"{reason} ({', '.join(labels)})"
