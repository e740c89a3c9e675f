"""Writes the tools' images: with their settings, which reproduce them, and as labelled grids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ipa.errors import UserError
from ipa.files import write_atomically

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SETTINGS = "ipa"  # the PNG's text chunk
LABEL_PX, GAP_PX = 14, 4


def check_format(out: Path) -> None:
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"out={out}: the name of an image ends with one of {', '.join(FORMATS)}")


def write_picture(image: Image.Image, out: Path, settings: dict[str, Any]) -> None:
    """Write atomically; a PNG has its settings in a text chunk."""
    check_format(out)
    kind, options = FORMATS[out.suffix.lower()], {}
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt(SETTINGS, json.dumps(settings, ensure_ascii=False))
        options["pnginfo"] = info
    write_atomically(out, lambda path: image.save(path, format=kind, **options))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a PNG that ``write_picture`` wrote; raises UserError for any other file."""
    if not path.is_file():
        raise UserError(f"again={path}: no such file")
    try:
        with Image.open(path) as image:
            image.load()
            return dict(json.loads(image.info[SETTINGS]))
    except (KeyError, OSError, ValueError, TypeError, RecursionError, Image.DecompressionBombError) as error:
        raise UserError(f"again={path} has no settings of ipa.tools.sample: only its PNG files have") from error


def grid(cells: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Images in rows and columns, with labels where there are any."""
    font = ImageFont.load_default(LABEL_PX)
    left = max((int(font.getlength(label)) for label in rows), default=0) + (GAP_PX if any(rows) else 0)
    top = LABEL_PX + GAP_PX if any(columns) else 0
    width, height = (max(size) for size in zip(*(cell.size for line in cells for cell in line), strict=True))
    pitch = GAP_PX + max(width, *(int(font.getlength(label)) for label in columns))
    size = (left + len(cells[0]) * pitch - GAP_PX, top + len(cells) * (height + GAP_PX) - GAP_PX)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for x, label in enumerate(columns):
        pen.text((left + x * pitch, 0), label, fill="black", font=font)
    for y, (label, line) in enumerate(zip(rows, cells, strict=True)):
        pen.text((0, top + y * (height + GAP_PX)), label, fill="black", font=font)
        for x, cell in enumerate(line):
            sheet.paste(cell, (left + x * pitch, top + y * (height + GAP_PX)))
    return sheet
