"""A contact sheet of samples as the model gets them: target, reference, caption, and what is dropped."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ipa.types import Batch, to_uint8, to_unit_range

CELL_PX, CAPTION_LINES, LINE_PX, GAP_PX, COLUMNS = 128, 3, 12, 6, 4
GREY = "#e8e8e8"


def draw_cell(batch: Batch, row: int) -> Image.Image:
    """Target and reference side by side, the caption below, in red what is dropped."""
    width = 2 * CELL_PX + GAP_PX
    cell = Image.new("RGB", (width, CELL_PX + (CAPTION_LINES + 1) * LINE_PX + GAP_PX), "white")
    for n, pixels_B3HW in enumerate((batch.image_B3HW, batch.reference_B3HW)):
        assert pixels_B3HW is not None, "only pictures can be shown"
        picture = as_seen(pixels_B3HW[row])
        cell.paste(ImageOps.pad(picture, (CELL_PX, CELL_PX), color=GREY), (n * (CELL_PX + GAP_PX), 0))
    pen = ImageDraw.Draw(cell)
    flags = {"text": batch.draws.drop_text_B, "image": batch.draws.drop_image_B}
    drops = [name for name, dropped_B in flags.items() if dropped_B[row]]
    pen.text((0, CELL_PX), f"{' and '.join(drops)} dropped" if drops else "", fill="red")
    for line, words in enumerate(textwrap.wrap(batch.text[row], width // 6)[:CAPTION_LINES], 1):
        pen.text((0, CELL_PX + line * LINE_PX), words, fill="black")
    return cell


def as_seen(pixels_3HW: Tensor) -> Image.Image:
    """Normalised as for the model, and back."""
    return Image.fromarray(to_uint8(to_unit_range(pixels_3HW)).permute(1, 2, 0).numpy())


def tile(cells: Sequence[Image.Image]) -> Image.Image:
    columns = min(COLUMNS, len(cells))
    width, height = cells[0].width + 2 * GAP_PX, cells[0].height + GAP_PX
    sheet = Image.new("RGB", (width * columns, height * -(-len(cells) // columns) + GAP_PX), "white")
    for n, cell in enumerate(cells):
        sheet.paste(cell, (GAP_PX + n % columns * width, GAP_PX + n // columns * height))
    return sheet
