"""The columns of the paper's Table 1 and our other metrics, a row for every system, skipped ones as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ipa.evaluation.report.headings import AXES, Heading, heading, plain_number, sorted_metrics
from ipa.evaluation.report.paper import is_papers_benchmark, is_papers_protocol, kind_of, paper_row
from ipa.evaluation.report.reading import COMPLETE, Evaluation, Score, System

NOTHING = "–"
YES_OR_NO = {True: "✓", False: "✗", None: ""}
# our metric, which is also its name in a PaperRow → the column of the paper's figures
PAPERS = {"clip_score": "CLIP-T, paper", "clip_i": "CLIP-I, paper"}


@dataclass(frozen=True)
class Cell:
    """``order`` sorts, None last; ``interval`` is set small beside ``text``; ``why`` says why there is no figure."""

    text: str
    order: float | str | None = None
    interval: str = ""
    why: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Column:
    """``cell`` makes what stands in a system's row; ``is_number`` sets it to the right."""

    title: str
    cell: Callable[[System], Cell]
    about: str = ""
    is_number: bool = False
    metric: str | None = None
    is_flag: bool = False


@dataclass(frozen=True)
class Row:
    """``note`` says what is the matter with a system that has no scores: what to download, how far it is."""

    system: System
    cells: Sequence[Cell]
    note: str = ""


@dataclass(frozen=True)
class Table:
    columns: Sequence[Column]
    rows: Sequence[Row]
    # metric → its reason → the labels that it holds for
    missing: dict[str, dict[str, list[str]]] = field(default_factory=dict)


def make_table(evaluation: Evaluation) -> Table:
    columns = list(all_columns(evaluation))
    rows = [Row(each, [column.cell(each) for column in columns], note_on(each)) for each in evaluation.systems]
    return without_empty(Table(columns, rows, missing_of(evaluation.systems)))


def all_columns(evaluation: Evaluation) -> Iterator[Column]:
    yield Column("system", lambda system: text(kind_of(system.name).title))
    yield Column("run", lambda system: text(system.label), "the folder of its pictures")
    yield from setting_columns(evaluation.systems)
    yield Column(
        "custom models",
        lambda system: text(YES_OR_NO[kind_of(system.name).custom_models]),
        "works with other models that were tuned from the same base",
        is_flag=True,
    )
    yield Column(
        "structure tools",
        lambda system: text(YES_OR_NO[kind_of(system.name).tools]),
        "works together with structure controls such as ControlNet",
        is_flag=True,
    )
    yield Column(
        "text too",
        lambda system: text(YES_OR_NO[system.method.get("uses_text")]),
        "takes a text beside the image prompt",
        is_flag=True,
    )
    yield Column("trained", trained, "parameters that were trained for image prompts", is_number=True)
    yield from metric_columns(evaluation)


def setting_columns(systems: Sequence[System]) -> Iterator[Column]:
    """Those settings of sampling in which the systems differ."""
    for axis, title in AXES.items():
        if len({each.sampling.get(axis) for each in systems if each.sampling}) > 1:
            yield Column(title, partial(setting, axis=axis), is_number=True)
    if len({each.prompt for each in systems if each.prompt}) > 1:
        yield Column("text", lambda system: text(system.prompt or ""), "what text the systems got")


def metric_columns(evaluation: Evaluation) -> Iterator[Column]:
    beside_paper = is_papers_benchmark(evaluation.name, len(evaluation.items), evaluation.num_seeds)
    for name in sorted_metrics({name for system in evaluation.systems for name in system.scores}):
        about = heading(name)
        best = best_value(evaluation.systems, name)
        yield Column(
            about.title + arrow(evaluation.systems, name),
            partial(metric, name=name, best=best),
            about.about,
            is_number=True,
            metric=name,
        )
        if beside_paper and name in PAPERS:
            yield Column(PAPERS[name], partial(papers, name=name), "Ye et al. 2023, Table 1", is_number=True)


def text(words: str) -> Cell:
    return Cell(words, words or None)


def setting(system: System, axis: str) -> Cell:
    value = system.sampling.get(axis)
    return Cell("" if value is None else plain_number(value), value)


def trained(system: System) -> Cell:
    """Ours as counted, else the paper's count if it has only one of this system."""
    counted = system.method.get("trained")
    if counted is not None:
        return Cell(f"{counted / 1e6:.1f} M" if counted >= 1e6 else f"{counted:,}", counted)
    row = paper_row(system.name, None)
    return Cell(f"{row.trained} M", row.trained * 1e6, "(paper)") if row else Cell("")


def metric(system: System, name: str, best: float | None) -> Cell:
    score = system.scores.get(name)
    if score is None:
        return Cell(
            NOTHING,
            why=system.missing.get(name) or note_on(system) or "not asked for in this run",
        )
    value = f"{score.value:.{heading(name).digits}f}"
    return Cell(value, score.value, interval_of(score, heading(name)), is_best=score.value == best)


def interval_of(score: Score, about: Heading) -> str:
    if score.low is not None and score.high is not None:
        return f"[{score.low:.{about.digits}f}, {score.high:.{about.digits}f}]"
    return f"± {score.deviation:.{about.digits}f}" if score.deviation is not None else ""


def papers(system: System, name: str) -> Cell:
    """The paper's figure, where the pictures were made as the paper's, or could not be made at all."""
    row = paper_row(system.name, system.method.get("trained"))
    if row is None or (system.sampling and not is_papers_protocol(system.sampling, system.prompt)):
        return Cell("")
    return Cell(f"{getattr(row, name):.3f}", getattr(row, name))


def direction(systems: Sequence[System], name: str) -> bool | None:
    """Whether more of a metric is better, as its scores say."""
    return next((system.scores[name].higher for system in systems if name in system.scores), None)


def arrow(systems: Sequence[System], name: str) -> str:
    return {True: " ↑", False: " ↓", None: ""}[direction(systems, name)]


def best_value(systems: Sequence[System], name: str) -> float | None:
    """None also where there is nothing to compare."""
    values = [system.scores[name].value for system in systems if name in system.scores]
    higher = direction(systems, name)
    if higher is None or len(values) < 2:
        return None
    return max(values) if higher else min(values)


def note_on(system: System) -> str:
    if system.status == COMPLETE:
        return "" if system.scores or system.missing else "not scored yet"
    if system.reason:
        return f"{system.status}: {system.reason}"
    return f"{system.status}: {system.num_pictures} of {system.num_planned} pictures are there"


def missing_of(systems: Sequence[System]) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for system in systems:
        for name, reason in system.missing.items():
            found.setdefault(name, {}).setdefault(reason, []).append(system.label)
    return {name: found[name] for name in sorted_metrics(set(found))}


def missing_lines(table: Table) -> Iterator[tuple[str, str]]:
    """Metric and why it has no figures, with the labels where it has some."""
    scored = [row.system.label for row in table.rows if row.system.scores or row.system.missing]
    for name, reasons in table.missing.items():
        for reason, labels in reasons.items():
            where = "" if labels == scored else f" ({', '.join(labels)})"
            yield heading(name).title, reason + where


def summary(evaluation: Evaluation) -> str:
    """What was asked and how figures are to be read, in a few sentences."""
    seeds = evaluation.num_seeds
    made = f"{len(evaluation.items):,} image prompts, {seeds} picture{'s' * (seeds > 1)} of each"
    skipped = sum(system.status == "skipped" for system in evaluation.systems)
    ran = len(evaluation.systems) - skipped
    told = f"{made}; {ran} run{'s' * (ran != 1)}" + (f", {skipped} skipped" if skipped else "")
    return (
        f"{told}. With a figure stands its 95 % confidence interval over the image prompts. "
        "Bold: a column's best figure; where intervals overlap the order is open."
    )


def without_empty(table: Table) -> Table:
    """Columns that say nothing in any row, left out."""
    kept = [place for place in range(len(table.columns)) if any(row.cells[place].text for row in table.rows)]
    rows = [replace(row, cells=[row.cells[place] for place in kept]) for row in table.rows]
    return replace(table, columns=[table.columns[place] for place in kept], rows=rows)
