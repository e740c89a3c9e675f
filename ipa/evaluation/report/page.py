"""Fills the templates: ``page.html.jinja``, one file that opens offline, and ``table.md.jinja``."""

from __future__ import annotations

import functools
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from ipa.errors import UserError
from ipa.evaluation.report.curves import data_uri, describe, draw, find_bars, find_charts, line_style
from ipa.evaluation.report.names import heading, kind_of
from ipa.evaluation.report.reading import Evaluation, Item, System, flattened
from ipa.evaluation.report.table import Table, missing_lines

MAX_SHOWN_SEEDS = 4
WEBP_QUALITY = 82
CLIP_I = "clip_i"
# an item and its images on the page, the image prompt first
Row = tuple[Item, Sequence[Path | None]]


@dataclass(frozen=True)
class Shown:
    """The images on the page: ``rows`` items sampled with ``seed``, the ``best`` and as many worst of ``system``."""

    rows: int = 12
    seed: int = 0
    best: int = 6
    system: str | None = None
    thumbnail_px: int = 160


def make_page(evaluation: Evaluation, table: Table, shown: Shown) -> str:
    """Raises UserError for a ``shown.system`` that does not exist."""
    thumbnail = functools.cache(functools.partial(thumbnail_uri, edge_px=shown.thumbnail_px))
    system = choose_system(evaluation, shown.system)
    cards = make_cards(evaluation, system, shown.best) if system else {}
    items = choose_items(evaluation, shown.rows, shown.seed) if evaluation.drawn else ()
    grid: list[Row] = [(item, evaluation.pictures_of(item)) for item in items]
    return render(
        "page.html.jinja",
        evaluation,
        table,
        charts=[(chart, draw(chart), describe(chart)) for chart in find_charts(evaluation)],
        line_style=line_style,
        bars=find_bars(evaluation),
        grid=grid,
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
    status = {"status": system.status, **({"reason": system.reason} if system.reason else {})}
    images = {"images": f"{system.num_pictures:,} of {system.num_planned:,}"}
    return as_text({**status, **system.settings, **images})


def as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """Dotted name → value, as it is typed on the command line."""
    return {
        name: value or '""' if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in flattened(settings)
    }


def choose_items(evaluation: Evaluation, count: int, seed: int) -> list[Item]:
    """``count`` items in the benchmark's order, if possible of those that every system with images has."""
    everywhere = [item for item in evaluation.items if all(item.id in system.pictures for system in evaluation.drawn)]
    pool = everywhere if len(everywhere) >= count else list(evaluation.items)
    positions = random.Random(seed).sample(range(len(pool)), min(count, len(pool)))
    return [pool[position] for position in sorted(positions)]


def choose_system(evaluation: Evaluation, label: str | None) -> System | None:
    """The system with that label, or the one with the highest CLIP-I. Raises UserError for one without CLIP-I."""
    scored = [system for system in evaluation.systems if system.per_item.get(CLIP_I) and CLIP_I in system.scores]
    if label is None:
        return max(scored, key=lambda system: system.scores[CLIP_I].value, default=None)
    found = {system.label: system for system in scored}
    if label not in found:
        raise UserError(f"system={label}: not a system with CLIP-I; possible: {', '.join(found) or 'none'}")
    return found[label]


def extremes(system: System, items: Sequence[Item], count: int) -> tuple[list[Item], list[Item]]:
    """Items with the highest CLIP-I, best first, and with the lowest, worst first; none is in both."""
    values = system.per_item[CLIP_I]
    ranked = sorted((item for item in items if item.id in values), key=lambda item: (-values[item.id], item.id))
    count = min(count, len(ranked) // 2)
    return ranked[:count], ranked[::-1][:count]


def read_thumbnail(path: Path | None, edge_px: int) -> Image.Image | None:
    """An RGB image whose longer edge has at most ``edge_px``; None if it is missing or cannot be read."""
    if path is None:
        return None
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError):
        return None
    small.thumbnail((edge_px, edge_px), Image.Resampling.LANCZOS)
    return small


def thumbnail_uri(path: Path | None, edge_px: int) -> str | None:
    """The same as a data URI."""
    small, content = read_thumbnail(path, edge_px), io.BytesIO()
    if small is None:
        return None
    small.save(content, format="WEBP", quality=WEBP_QUALITY, method=4)
    return data_uri("webp", content.getvalue())
