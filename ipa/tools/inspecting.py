"""What `python -m ipa.tools.inspect` finds in shards, and the contact sheet of how a training on them begins.

No model is loaded; sizes come from the configuration files of base and encoder.
"""

from __future__ import annotations

import logging
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from ipa.data.datamodule import ShardDataModule
from ipa.data.images.preparation import Sample
from ipa.data.order.lanes import Lane
from ipa.data.order.sequence import Slot
from ipa.data.rejects import Rejected
from ipa.errors import UserError
from ipa.files import write_atomically
from ipa.training.parts import read_widths
from ipa.types import Batch, to_uint8, to_unit_range

log = logging.getLogger(__name__)

CELL_PX, LINES, LINE_PX, GAP_PX = 128, 3, 12, 6
STAGE_SAMPLES = 256


@dataclass
class Findings:
    """What was seen: original sizes (height, width), caption lengths in characters, rejects by reason, seconds."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    rejects: Counter[str] = field(default_factory=Counter)
    buckets: Counter[tuple[int, int]] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, batch: Batch) -> None:
        assert batch.size_B6 is not None
        for height, width, _, _, target_height, target_width in batch.size_B6.tolist():
            self.sizes.append((height, width))
            self.buckets[target_width, target_height] += 1
        self.captions += map(len, batch.text)
        self.rejects.update(batch.rejects)


def inspect(cfg: DictConfig) -> None:
    """Print what was found and write the contact sheet; raises UserError with a message for the user."""
    if cfg.pictures < 1 or (cfg.samples is not None and cfg.samples < 1):
        raise UserError(f"pictures={cfg.pictures} samples={cfg.samples}: at least 1 of each")
    datamodule: Any = instantiate(cfg.data)
    if not isinstance(datamodule, ShardDataModule):
        raise UserError("a feature cache holds no pictures to look at: give the data that it was made from")
    datamodule.batch_size = min(16, cfg.samples or 16)
    datamodule.fit_to(
        image_size_px=cfg.image_size_px or read_image_size(cfg.base),
        reference_size_px=read_widths(cfg.encoder).image_size_px,
        latent_shape=(1, 8, 8),  # the noise is not looked at
    )
    findings = look(datamodule, cfg.samples)
    if not findings.sizes:
        raise UserError("there is no good sample in these shards; the log above tells what was rejected, and why")
    print(describe(findings, datamodule.num_workers))
    print(describe_stages(datamodule))
    out, sheet = Path(cfg.out), tile([draw_cell(batch) for batch in first_batches(datamodule, cfg.pictures)])
    write_atomically(out, lambda beside: sheet.save(beside, format="PNG"))
    print(f"wrote {out}")


def read_image_size(base: DictConfig) -> int:
    """The picture size that the base was made for, from its configuration files."""
    return instantiate({**base, "_target_": base._target_.replace("from_pretrained", "read_image_size_px")})


def look(datamodule: Any, samples: int | None) -> Findings:
    """Every good sample once, or the first ``samples`` of all workers' shards."""
    findings = Findings()
    started = time.perf_counter()
    with tqdm(total=samples, unit=" samples", desc="reading") as bar:
        for batch in datamodule.audit_dataloader():
            findings.add(batch)
            bar.update(len(batch))
            if samples is not None and len(findings.sizes) >= samples:
                break
    findings.seconds = time.perf_counter() - started
    return findings


def describe(findings: Findings, workers: int) -> str:
    """The findings as lines for the console."""
    good, bad = len(findings.sizes), sum(findings.rejects.values())
    lines = [
        f"{good:,} good samples, {bad:,} rejected ({100 * bad / (good + bad):.1f} %)",
        *(f"    {count:8,}  {reason}" for reason, count in findings.rejects.most_common()),
        quantiles("shorter side (px)", [min(size) for size in findings.sizes]),
        quantiles("aspect ratio", [max(size) / min(size) for size in findings.sizes]),
        quantiles("caption (characters)", findings.captions),
        f"{good / findings.seconds:,.0f} samples/s with {workers} workers, their start included",
    ]
    if len(findings.buckets) > 1:
        most = ", ".join(f"{w} × {h}: {count:,}" for (w, h), count in findings.buckets.most_common(12))
        lines.append(f"buckets (width × height): {most}")
    return "\n".join(lines)


def quantiles(name: str, values: list[Any]) -> str:
    at = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0, 0.05, 0.5, 0.95, 1], dtype=torch.float64))
    low, few, middle, most, high = at.tolist()
    return f"{name}: median {middle:.4g}, 5 % below {few:.4g}, 5 % above {most:.4g}, from {low:.4g} to {high:.4g}"


def describe_stages(datamodule: Any) -> str:
    """Samples per second of one process in each stage alone, over the first samples of the training order."""
    order, preparation = datamodule.train_order, datamodule.train_preparation()
    slots, read = timed(lambda: list(islice(training_order(datamodule), STAGE_SAMPLES)))
    samples, decoded = timed(lambda: list(prepared(slots, order, preparation)))
    _, drawn = timed(lambda: preparation.batch(samples, Counter(), None))
    good = len(samples)
    rates = {"reading": len(slots) / read, "decoding and cutting": good / decoded, "drawing": good / drawn}
    return "one process, samples/s: " + ", ".join(f"{stage} {rate:,.0f}" for stage, rate in rates.items())


def training_order(datamodule: Any) -> Iterator[Slot]:
    """As a training in one process begins."""
    order = datamodule.train_order
    return order.lane(Lane(), datamodule.batch_size).endless(order.begin())


def first_batches(datamodule: Any, pictures: int) -> Iterator[Batch]:
    """The first samples that a training in one process sees, each a batch with its own draws."""
    order, preparation = datamodule.train_order, datamodule.train_preparation()
    slots = islice(training_order(datamodule), 4 * pictures)  # some may be broken
    samples = prepared(slots, order, preparation, in_buckets=True)
    return (preparation.batch([sample], Counter(), None) for sample in islice(samples, pictures))


def prepared(slots: Iterable[Slot], order: Any, preparation: Any, in_buckets: bool = False) -> Iterator[Sample]:
    """The good ones, cut to their buckets, or all to the square, so that they can be stacked."""
    for slot in slots:
        try:
            yield preparation.sample(slot.record, order.address(slot), slot.target if in_buckets else None)
        except Rejected:
            continue


def timed(do: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return do(), time.perf_counter() - started


def draw_cell(batch: Batch) -> Image.Image:
    """A batch of one: target and reference as the model gets them, the caption below, what is dropped in red."""
    width = 2 * CELL_PX + GAP_PX
    cell = Image.new("RGB", (width, CELL_PX + (LINES + 1) * LINE_PX + GAP_PX), "white")
    for n, pixels_B3HW in enumerate((batch.image_B3HW, batch.reference_B3HW)):
        assert pixels_B3HW is not None, "only pictures can be shown"
        cell.paste(fit(as_seen(pixels_B3HW[0])), (n * (CELL_PX + GAP_PX), 0))
    pen = ImageDraw.Draw(cell)
    flags = {"text": batch.draws.drop_text_B, "image": batch.draws.drop_image_B}
    drops = [name for name, dropped_B in flags.items() if dropped_B[0]]
    pen.text((0, CELL_PX), f"{' and '.join(drops)} dropped" if drops else "", fill="red")
    for line, words in enumerate(textwrap.wrap(batch.text[0], width // 6)[:LINES], 1):
        pen.text((0, CELL_PX + line * LINE_PX), words, fill="black")
    return cell


def as_seen(pixels_3HW: Tensor) -> Image.Image:
    """Normalised as for the model, and back."""
    return Image.fromarray(to_uint8(to_unit_range(pixels_3HW)).permute(1, 2, 0).numpy())


def fit(picture: Image.Image) -> Image.Image:
    """The whole picture in a square cell."""
    scale = CELL_PX / max(picture.size)
    small = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    cell = Image.new("RGB", (CELL_PX, CELL_PX), "#e8e8e8")
    cell.paste(small, ((CELL_PX - small.width) // 2, (CELL_PX - small.height) // 2))
    return cell


def tile(cells: list[Image.Image], columns: int = 4) -> Image.Image:
    columns = min(columns, len(cells))
    width, height = cells[0].width + 2 * GAP_PX, cells[0].height + GAP_PX
    sheet = Image.new("RGB", (width * columns, height * -(-len(cells) // columns) + GAP_PX), "white")
    for n, cell in enumerate(cells):
        sheet.paste(cell, (GAP_PX + n % columns * width, GAP_PX + n // columns * height))
    return sheet
