"""The page: one file that opens without a network, pictures, style and script in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ipa.evaluation.report.curves import draw
from ipa.evaluation.report.elements import Html, element, join
from ipa.evaluation.report.headings import heading, plain_number
from ipa.evaluation.report.paper import kind_of
from ipa.evaluation.report.pictures import (
    CLIP_I,
    Thumbnails,
    all_pictures,
    choose_items,
    choose_system,
    extremes,
    first_picture,
)
from ipa.evaluation.report.reading import Evaluation, Item, System
from ipa.evaluation.report.style import SCRIPT, STYLE
from ipa.evaluation.report.sweeps import find_charts, flattened
from ipa.evaluation.report.table import Cell, Column, Row, Table, missing_lines, summary

NUM_SHOWN_SEEDS = 4


@dataclass(frozen=True)
class Shown:
    """What pictures the page has: ``rows`` prompts drawn with ``seed``, the ``best`` and as many worst of ``system``.

    Pictures are left out, rows of the grid first, where they would take more than ``limit_mb`` in the file.
    """

    rows: int = 12
    seed: int = 0
    best: int = 6
    system: str | None = None
    thumbnail_px: int = 160
    limit_mb: float = 8.0


def make_page(evaluation: Evaluation, table: Table, shown: Shown) -> str:
    """Raises UserError for a ``shown.system`` that is not there."""
    thumbnails = Thumbnails(shown.thumbnail_px)
    extreme = extreme_sections(evaluation, shown, thumbnails)  # first, so that the grid gets what room is left
    parts = {
        "Scores": score_section(table),
        "Curves": curve_section(evaluation),
        "Pictures": grid_section(evaluation, shown, thumbnails),
        "Best and worst": extreme,
        "Settings": setting_section(evaluation),
    }
    sections = [section(title, content) for title, content in parts.items() if content]
    links = [element("a", title, href=f"#{anchor(title)}") for title, content in parts.items() if content]
    title = f"Evaluation: {evaluation.name}"
    top = element("header", element("h1", title), element("p", summary(evaluation)), element("nav", *links))
    return "<!doctype html>\n" + element(
        "html",
        head(title),
        element("body", element("main", top, *sections), element("script", Html(SCRIPT))),
        lang="en",
    )


def head(title: str) -> Html:
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(STYLE)),
    )


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def section(title: str, content: Html) -> Html:
    return element("section", element("h2", title), content, id=anchor(title))


def score_section(table: Table) -> Html:
    """The table; a row's label stands under the system's name, what is known by yes and no at the end."""
    shown = [(place, column) for place, column in enumerate(table.columns) if column.title != "run"]
    shown.sort(key=lambda each: each[1].is_flag)
    heads = [column_head(place, column) for place, column in shown]
    rows = [element("tr", *row_cells(row, shown)) for row in table.rows]
    whole = element("table", element("thead", element("tr", *heads)), element("tbody", *rows), class_="scores")
    abouts = [(column.title, column.about) for _, column in shown if column.about]
    missing = list(missing_lines(table))
    return join(
        [
            element("p", "A click on a column's head sorts by it.", class_="soft"),
            element("div", whole, class_="scroll"),
            *([element("h3", "Why figures are missing"), definitions(missing)] if missing else []),
            element("h3", "What the columns say"),
            definitions(abouts),
        ]
    )


def column_head(place: int, column: Column) -> Html:
    """``data-first`` is the direction of the first click: the best on top."""
    downwards = column.is_flag or (column.metric is not None and "↓" not in column.title)
    return element(
        "th",
        element("button", column.title, type="button"),
        title=column.about or None,
        scope="col",
        class_=kind_class(column),
        data_column=place,
        data_number=column.is_number,
        data_first="descending" if downwards else "ascending",
    )


def kind_class(column: Column) -> str | None:
    return "number" if column.is_number else "flag" if column.is_flag else None


def row_cells(row: Row, shown: Sequence[tuple[int, Column]]) -> Iterator[Html]:
    """The note of a row without scores takes the place of all of them."""
    noted = [place for place, column in shown if column.metric] if row.note else []
    for place, column in shown:
        cell = row.cells[place]
        if column.title == "system":
            label = element("code", row.system.label)
            note = [element("span", row.note, class_="note")] if row.note and not noted else []
            yield element("th", cell.text, label, *note, scope="row", data_column=place, data_order=cell.order)
        elif place not in noted:
            yield table_cell(place, cell, column)
        elif place == noted[0]:
            yield element("td", row.note, class_="note", colspan=len(noted))


def table_cell(place: int, cell: Cell, column: Column) -> Html:
    names = [kind_class(column) or "", "best" if cell.is_best else ""]
    interval = [element("span", cell.interval, class_="interval")] if cell.interval else []
    told = {"class_": " ".join(filter(None, names)) or None, "title": cell.why or None}
    return element("td", cell.text, *interval, **told, data_column=place, data_order=cell.order)


def definitions(pairs: Sequence[tuple[str, str]]) -> Html:
    parts = [part for name, words in pairs for part in (element("dt", name), element("dd", words))]
    return element("dl", *parts, class_="about")


def curve_section(evaluation: Evaluation) -> Html:
    charts = find_charts(evaluation)
    if not charts:
        return Html()
    words = "Runs that differ in nothing but what stands on the horizontal axis. Bands are the confidence intervals."
    return join([element("p", words, class_="soft"), element("div", *map(draw, charts), class_="charts")])


def grid_section(evaluation: Evaluation, shown: Shown, thumbnails: Thumbnails) -> Html:
    """Prompt × system: rows until the file is full."""
    systems, items = evaluation.drawn, choose_items(evaluation, shown.rows, shown.seed)
    if not systems or not items:
        return Html()
    rows: list[Html] = []
    for item in items:
        row = grid_row(evaluation, item, thumbnails)
        if thumbnails.bytes_used > shown.limit_mb * 1e6:
            break
        rows.append(row)
    heads = [element("th", kind_of(each.name).title, " ", element("code", each.label), scope="col") for each in systems]
    top = element("thead", element("tr", element("th", "image prompt", scope="col"), *heads))
    table = element("table", top, element("tbody", *rows), class_="shots many" if len(systems) > 6 else "shots")
    words = grid_words(evaluation, shown, len(rows), len(items))
    return join([element("p", words, class_="soft"), element("div", table, class_="scroll")])


def grid_words(evaluation: Evaluation, shown: Shown, num_rows: int, num_items: int) -> str:
    words = f"{num_rows} of {len(evaluation.items):,} image prompts, drawn by lot (seed {shown.seed})."
    if evaluation.num_seeds > 1:
        words += f" Each picture is the first of {evaluation.num_seeds}; under it CLIP-I, the mean of all of them."
    else:
        words += " Under each picture its CLIP-I."
    if num_rows < num_items:
        words += f" {num_items - num_rows} are left out: pictures may take {shown.limit_mb:g} MB of this file."
    return words


def grid_row(evaluation: Evaluation, item: Item, thumbnails: Thumbnails) -> Html:
    first = element("th", shot(thumbnails.address(item.reference), item.id), caption(item), scope="row")
    cells = []
    for system in evaluation.drawn:
        picture = shot(thumbnails.address(first_picture(system, item)), f"{system.label}, {item.id}")
        cells.append(element("td", picture, element("span", value_of(system, item), class_="words")))
    return element("tr", first, *cells)


def shot(address: str | None, alternative: str) -> Html:
    if address is None:
        return element("span", "no picture", class_="shot none")
    return element("img", src=address, alt=alternative, class_="shot", loading="lazy")


def caption(item: Item) -> Html:
    words = item.captions[0] if item.captions else item.id
    return element("span", words, class_="words", title=f"item {item.id}")


def value_of(system: System, item: Item) -> str:
    value = system.per_item.get(CLIP_I, {}).get(item.id)
    return "" if value is None else f"{value:.{heading(CLIP_I).digits}f}"


def extreme_sections(evaluation: Evaluation, shown: Shown, thumbnails: Thumbnails) -> Html:
    """Cards of the best and the worst items."""
    system = choose_system(evaluation, shown.system)
    best, worst = extremes(evaluation, system, shown.best) if system else ([], [])
    if system is None or not best:
        return Html()
    why = "the one of highest CLIP-I" if shown.system is None else "as asked for"
    num_shots = 1 + min(evaluation.num_seeds, NUM_SHOWN_SEEDS)
    name = element("code", system.label)
    words = [f"{kind_of(system.name).title} ", name, f" ({why}), by CLIP-I; framed: the image prompt."]
    parts = [element("p", *words, class_="soft")]
    for title, items in (("Nearest to their prompts", best), ("Farthest from their prompts", worst)):
        cards = [card(system, item, thumbnails) for item in items]
        parts += [element("h3", title), element("div", *cards, class_="cards", style=f"--n: {num_shots}")]
    return join(parts)


def card(system: System, item: Item, thumbnails: Thumbnails) -> Html:
    pictures = all_pictures(system, item)[:NUM_SHOWN_SEEDS]
    shots = [shot(thumbnails.address(path), f"{system.label}, {item.id}") for path in pictures]
    row = element("div", shot(thumbnails.address(item.reference), "image prompt"), *shots, class_="row")
    told = element("figcaption", element("b", value_of(system, item)), " ", caption(item))
    return element("figure", row, told, class_="card")


def setting_section(evaluation: Evaluation) -> Html:
    """What all systems share, once, and what each has of its own."""
    told = {system.label: told_settings(system) for system in evaluation.systems}
    ran = [told[system.label] for system in evaluation.systems if system.pictures]
    shared = {name: value for name, value in (ran[0] if ran else {}).items() if all(e.get(name) == value for e in ran)}
    parts = [settings_of("The benchmark", benchmark_settings(evaluation), is_open=True)]
    if len(ran) > 1:
        parts.append(settings_of("The same in all runs", shared, is_open=True))
    for system in evaluation.systems:
        own = {n: v for n, v in told[system.label].items() if len(ran) < 2 or shared.get(n) != v}
        parts.append(settings_of(system.label, own))
    return join(parts)


def benchmark_settings(evaluation: Evaluation) -> dict[str, str]:
    counts = {"items": f"{len(evaluation.items):,}", "pictures of each": str(evaluation.num_seeds)}
    return {**{name: words_of(value) for name, value in flattened(evaluation.benchmark)}, **counts}


def told_settings(system: System) -> dict[str, str]:
    """Dotted name → words, with state and hashes."""
    status = {"status": system.status, **({"reason": system.reason} if system.reason else {})}
    hashes = {f"sha256 of {name}": value for name, value in system.hashes.items()}
    settings = {name: words_of(value) for name, value in flattened(system.settings)}
    return {**status, **settings, "pictures": f"{system.num_pictures:,} of {system.num_planned:,}", **hashes}


def words_of(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping) or value == "":
        return "none"
    return ", ".join(map(words_of, value)) if isinstance(value, list) else plain_number(value)


def settings_of(title: str, settings: Mapping[str, str], is_open: bool = False) -> Html:
    pairs = [part for n, v in settings.items() for part in (element("dt", n), element("dd", element("code", v)))]
    return element("details", element("summary", title), element("dl", *pairs, class_="about"), open=is_open)
