"""Writes figures.json, and from its content alone index.md and page.html, which opens offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import ipa.evaluation.report
from demo.paper.claims import METRICS, Read, Section
from demo.paper.plan import as_data
from ipa.errors import UserError, brief
from ipa.evaluation.report.curves import INK, LINE, STYLE, Series, draw_series, line_style
from ipa.evaluation.report.reading import Score
from ipa.files import read_text, write_atomically, write_json

HERE = Path(__file__).parent
CSS = Path(ipa.evaluation.report.__file__).with_name("page.css")
CELL_PX, GAP_PX = 96, 3
WEBP_QUALITY = 88
COARSE = ("border",)  # metrics with one decimal
KINDS = {
    "heldout": "image prompts",
    "unseen": "image prompts in an unseen style",
    "own": "your images",
    "edges": "edges for the control",
}

Strips = Callable[[str], Tensor]  # kind of prompts → the first ones in uint8


def write_page(
    out: Path,
    figures: dict[str, Any],
    notes: Mapping[int, str],
    sections: Sequence[Section],
    read: Read,
    prompts: Strips,
) -> Path:
    """The Markdown page."""
    for content, section in zip(figures["sections"], sections, strict=True):
        content["notes"] = notes.get(section.number, "")
        content["pictures"] = write_strips(out / "images", section, read, prompts)
        for number, chart in enumerate(content.get("charts", ())):
            chart["file"] = f"images/{section.number}-chart{number}.svg"
            write_bytes(out / chart["file"], draw_chart(chart))
    write_json(out / "figures.json", figures)
    figures = as_data(figures)
    write_text(out / "page.html", render("page.html.jinja", figures, out))
    write_text(out / "index.md", render("index.md.jinja", figures, out))
    return out / "index.md"


def read_notes(out: Path, numbers: Collection[int]) -> dict[int, str]:
    """Number of a section → what we believe about its result; raises UserError for notes.yaml that is none."""
    path = out / "notes.yaml"
    try:
        found = yaml.safe_load(read_text(path)) if path.is_file() else None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {brief(error)}") from error
    notes = found or {}
    is_map = isinstance(notes, dict) and all(isinstance(text, str) for text in notes.values())
    if not is_map or any(type(key) is not int or key not in numbers for key in notes):
        raise UserError(f"{path}: give a mapping from numbers of sections to texts")
    return {number: text.strip() for number, text in notes.items()}


def write_strips(folder: Path, section: Section, read: Read, prompts: Strips) -> list[dict[str, str]]:
    """One picture for each row that is shown, of the first training seed, below the image prompts it was made from."""
    pictures, before = [], ""
    for number, name in enumerate(section.strip):
        ask = section.rows[name][0]
        if ask.prompts != before:
            before = ask.prompts
            pictures.append(picture(folder, f"{section.number}-{before}", KINDS[before], prompts(before)))
        pictures.append(picture(folder, f"{section.number}-{number}", name, read(ask).strip_N3HW))
    if any(section.rows[name][0].control for name in section.strip):
        pictures.insert(1, picture(folder, f"{section.number}-edges", KINDS["edges"], prompts("edges")))
    return pictures


def picture(folder: Path, name: str, title: str, strip_N3HW: Tensor) -> dict[str, str]:
    file = folder / f"{name}.webp"
    content = io.BytesIO()
    beside(strip_N3HW).save(content, format="WEBP", quality=WEBP_QUALITY, method=6)
    write_bytes(file, content.getvalue())
    return {"title": title, "file": f"{folder.name}/{file.name}"}


def beside(strip_N3HW: Tensor) -> Image.Image:
    """Images in a row."""
    pitch = CELL_PX + GAP_PX
    row = Image.new("RGB", (pitch * len(strip_N3HW) - GAP_PX, CELL_PX), "white")
    for number, image_3HW in enumerate(strip_N3HW):
        cell = Image.fromarray(image_3HW.permute(1, 2, 0).numpy())
        row.paste(cell.resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS), (number * pitch, 0))
    return row


def draw_chart(chart: Mapping[str, Any]) -> bytes:
    """SVG, the same bytes for the same figures."""
    content = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for number, (title, points) in enumerate(chart["lines"].items()):
            places = [point["x"] if point["across"] is None else point["across"]["mean"] for point in points]
            scores = [Score(*(point["y"][name] for name in ("mean", "low", "high"))) for point in points]
            draw_series(axes, Series(title, list(zip(places, scores, strict=True))), number)
            axes.plot([], [], color=line_style(number)[0], label=title)
        axes.set_xlabel(chart["axis"], color=INK)
        axes.set_ylabel(chart["metric"], color=INK)
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
        axes.grid(axis="y", color=LINE)
        if len(chart["lines"]) > 1:
            axes.legend(frameon=False)
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def render(template: str, figures: Mapping[str, Any], out: Path) -> str:
    environment = Environment(
        loader=FileSystemLoader([HERE, CSS.parent]),
        undefined=StrictUndefined,
        autoescape=template.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        each.__name__: each for each in (against, digits, first_figure, interval, mean, signed, fact, other_count)
    }
    embed = lambda file: data_uri(out / file)  # noqa: E731
    return environment.get_template(template).render(
        **figures, METRICS=METRICS, embed=embed, css=Markup(CSS.read_text())
    )


def data_uri(path: Path) -> str:
    kind = {".webp": "webp", ".svg": "svg+xml"}[path.suffix]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def mean(found: Mapping[str, Any] | None, metric: str) -> str:
    return "–" if found is None else f"{found['mean']:.{digits(metric)}f}"


def interval(found: Mapping[str, Any] | None, metric: str) -> str:
    """``[0.581, 0.638]``; empty without one."""
    if found is None or found["low"] is None:
        return ""
    return f"[{found['low']:.{digits(metric)}f}, {found['high']:.{digits(metric)}f}]"


def first_figure(section: Mapping[str, Any]) -> str:
    """For the table of all claims: the first test that gave the section its verdict."""
    if section.get("facts"):
        return f"{section['facts'][0]['fact']}: {fact(section['facts'][0]['value'])}"
    if not section.get("tests"):
        return ""
    test = next(test for test in section["tests"] if test["verdict"] == section["verdict"])
    return f"{test['claim']}: {signed(test['difference'], test['metric'])}{against(test)}"


def against(test: Mapping[str, Any]) -> str:
    factor = test.get("factor", 1)
    return "" if factor == 1 else f" (difference to {factor} × the other)"


def count(row: Mapping[str, Any]) -> int:
    return next((found["images"] for found in row["cells"].values() if found is not None), 0)


def other_count(row: Mapping[str, Any], section: Mapping[str, Any]) -> str:
    """`` (n = 3)`` for a row with another number of images than the first."""
    return "" if count(row) == count(section["rows"][0]) else f" (n = {count(row)})"


def signed(found: Mapping[str, Any], metric: str) -> str:
    """``+0.103 [+0.081, +0.126]``."""
    spread = (
        "" if found["low"] is None else f" [{found['low']:+.{digits(metric)}f}, {found['high']:+.{digits(metric)}f}]"
    )
    return f"{found['mean']:+.{digits(metric)}f}{spread}"


def digits(metric: str) -> int:
    return 1 if metric in COARSE else 3


def fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
