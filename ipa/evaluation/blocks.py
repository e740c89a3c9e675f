"""Measures what each block of a base carries of an image prompt, with λ in one block at a time.

The text and the noise of an image are the same in every row, so its difference to the first row, which has no block, is
the block's effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ipa.metrics.bootstrap import Interval, confidence_interval
from ipa.metrics.image_metric import ItemMetric
from ipa.prompter import Prompter
from ipa.references import Item, Reference
from ipa.types import to_unit_range

NONE, ALL = "no block (the base)", "all blocks"
Row = dict[str, Interval]


@dataclass(frozen=True)
class Measure:
    """A column: a metric's value ``name``, against the image prompts, or against the base's images of the same noise.

    With ``gain`` the value of the base's image is subtracted, for an interval of the difference itself. ``digits`` are
    those of the table; ``factor`` multiplies, 100 for per cent.
    """

    title: str
    metric: Callable[[], ItemMetric]
    name: str
    against_base: bool = False
    gain: bool = False
    digits: int = 2
    factor: float = 1.0

    def values(self, made: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
        metric = self.metric()
        metric.update(made, references)
        return metric.per_item()[self.name]


def selections(blocks: Sequence[str]) -> dict[str, Mapping[str, float] | str]:
    """Name of a row → its λ per block."""
    return {NONE: {}, ALL: dict.fromkeys(blocks, 1.0), **{block: {block: 1.0} for block in blocks}}


def sweep(
    prompter: Prompter,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    measures: Sequence[Measure],
    chosen: Mapping[str, Mapping[str, float] | str] | None = None,
    scale: float = 1.0,
    **sampling: object,
) -> Iterator[tuple[str, Row]]:
    """A row for each selection of blocks, with 95 % intervals over the pictures. Image i has text i and seed i."""
    rows = dict(chosen or selections(prompter.family.blocks()))
    base = pixels_of(draw(prompter, pictures, texts, rows.pop(NONE, {}), scale, **sampling))
    prompts = pixels_of(pictures)
    yield NONE, measured(base, prompts, base, measures)
    for name, blocks in rows.items():
        made = pixels_of(draw(prompter, pictures, texts, blocks, scale, **sampling))
        yield name, measured(made, prompts, base, measures)


def draw(
    prompter: Prompter,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    blocks: Mapping[str, float] | str,
    scale: float,
    **sampling: object,
) -> list[Image.Image]:
    pairs = enumerate(zip(pictures, texts, strict=True))
    items = [Item([Reference(picture, scale, blocks)], text, seed=seed) for seed, (picture, text) in pairs]
    return prompter.generate(items, **sampling)  # type: ignore[arg-type]


def pixels_of(pictures: Sequence[Image.Image]) -> list[Tensor]:
    """pixels_3HW in [-1, 1] of each."""
    return [to_unit_range(torch.from_numpy(np.array(each.convert("RGB"))).permute(2, 0, 1)) for each in pictures]


def measured(
    made: Sequence[Tensor], prompts: Sequence[Tensor], base: Sequence[Tensor], measures: Sequence[Measure]
) -> Row:
    row = {}
    for each in measures:
        values_B = each.values(made, base if each.against_base else prompts)
        if each.gain:
            values_B = values_B - each.values(base, prompts)
        row[each.title] = confidence_interval(each.factor * values_B, range(len(made)))
    return row


def as_table(rows: Mapping[str, Row], measures: Sequence[Measure], first: str = "λ in") -> str:
    """Markdown; each value with half the width of its 95 % interval."""
    lines = [[first, *(each.title for each in measures)], ["---"] * (1 + len(measures))]
    for name, row in rows.items():
        lines.append([name, *(shown(row[each.title], each.digits) for each in measures)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shown(interval: Interval, digits: int) -> str:
    return f"{interval.mean:.{digits}f} ± {(interval.high - interval.low) / 2:.{digits}f}"
