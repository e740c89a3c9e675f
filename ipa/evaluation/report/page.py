"""Renders the templates: ``page.html.jinja``, one file that opens offline, and ``table.md.jinja``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from ipa.evaluation.report.bars import find_bars
from ipa.evaluation.report.curves import describe, draw, find_charts, line_style
from ipa.evaluation.report.names import heading, kind_of
from ipa.evaluation.report.pictures import CLIP_I, Shown, choose_items, choose_system, extremes, thumbnail_uri
from ipa.evaluation.report.reading import Evaluation, Item, System, flattened
from ipa.evaluation.report.table import Table, missing_lines

MAX_SHOWN_SEEDS = 4
# an item and its images on the page, the image prompt first
Row = tuple[Item, Sequence[Path | None]]
Thumbnail = Callable[[Path | None], str | None]  # the data URI of an image


def make_page(evaluation: Evaluation, table: Table, shown: Shown) -> str:
    """Raises UserError for a ``shown.system`` that does not exist."""
    thumbnail = functools.cache(functools.partial(thumbnail_uri, edge_px=shown.thumbnail_px))
    system = choose_system(evaluation, shown.system)
    cards = make_cards(evaluation, system, shown.best) if system else {}
    max_bytes = shown.limit_mb * 1e6 - sum(num_bytes(row, thumbnail) for rows in cards.values() for row in rows)
    return render(
        "page.html.jinja",
        evaluation,
        table,
        charts=[(chart, draw(chart), describe(chart)) for chart in find_charts(evaluation)],
        line_style=line_style,
        bars=find_bars(evaluation),
        grid=list(fitting(make_grid(evaluation, shown), max_bytes, thumbnail)),
        cards=cards,
        card_system=system,
        settings=setting_groups(evaluation),
        shown=shown,
        kind_of=kind_of,
        thumbnail=thumbnail,
        clip_i_of=clip_i_of,
    )


def render(name: str, evaluation: Evaluation, table: Table, **values: Any) -> str:
    """A template with ``values``. HTML is escaped: labels, captions and reasons are untrusted text."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    values |= {"evaluation": evaluation, "table": table, "missing": list(missing_lines(table.systems))}
    return templates.get_template(name).render(values)


def make_cards(evaluation: Evaluation, system: System, count: int) -> dict[str, list[Row]]:
    """Title → the best, or the worst, items of a system."""
    best, worst = extremes(system, evaluation.items, count)
    groups = {"Closest to their image prompts": best, "Farthest from their image prompts": worst}
    return {
        title: [(item, [item.reference, *system.pictures.get(item.id, ())[:MAX_SHOWN_SEEDS]]) for item in items]
        for title, items in groups.items()
        if items
    }


def make_grid(evaluation: Evaluation, shown: Shown) -> list[Row]:
    """Random items, each with the first image of every system that has images."""
    items = choose_items(evaluation, shown.rows, shown.seed) if evaluation.drawn else ()
    return [(item, evaluation.pictures_of(item)) for item in items]


def fitting(rows: Sequence[Row], max_bytes: float, thumbnail: Thumbnail) -> Iterator[Row]:
    """The first rows, as many as their images do not exceed ``max_bytes``."""
    for row in rows:
        max_bytes -= num_bytes(row, thumbnail)
        if max_bytes < 0:
            return
        yield row


def num_bytes(row: Row, thumbnail: Thumbnail) -> int:
    return sum(len(thumbnail(path) or "") for path in row[1])


def clip_i_of(system: System, item: Item) -> str:
    value = system.per_item.get(CLIP_I, {}).get(item.id)
    return "" if value is None else f"{value:.{heading(CLIP_I).digits}f}"


def setting_groups(evaluation: Evaluation) -> list[tuple[str, dict[str, str]]]:
    """Title and settings: those of the benchmark, those that all runs share, and each run's own."""
    settings = {system.label: settings_of(system) for system in evaluation.systems}
    ran = [settings[system.label].items() for system in evaluation.drawn]
    shared = dict(item for item in ran[0] if all(item in other for other in ran)) if len(ran) > 1 else {}
    counts = {"items": len(evaluation.items), "images per item": evaluation.num_seeds}
    own = [
        (label, dict(item for item in each.items() if item not in shared.items())) for label, each in settings.items()
    ]
    general = [("Benchmark", as_text({**evaluation.benchmark, **counts})), ("Shared by all runs", shared)]
    return [group for group in general if group[1]] + own


def settings_of(system: System) -> dict[str, str]:
    """With status and hashes."""
    status = {"status": system.status, **({"reason": system.reason} if system.reason else {})}
    images = {"images": f"{system.num_pictures:,} of {system.num_planned:,}"}
    hashes = {f"sha256 of {name}": value for name, value in system.hashes.items()}
    return as_text({**status, **system.settings, **images, **hashes})


def as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """Dotted name → value, as it is typed on the command line."""
    return {
        name: value or '""' if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in flattened(settings)
    }
