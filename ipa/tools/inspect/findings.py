"""What is in the shards: counts, rejects, sizes, captions, the speed, and a contact sheet."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from ipa.data.datamodule import ShardDataModule
from ipa.data.order.lanes import Share
from ipa.data.order.sequence import Order
from ipa.data.records import Record
from ipa.data.rejects import Rejected, Tally
from ipa.data.shards.fields import Fields
from ipa.data.shards.source import read_shard
from ipa.data.shards.strip import Strip
from ipa.errors import UserError
from ipa.files import write_atomically
from ipa.tools.pictures import grid
from ipa.training.parts import read_from
from ipa.types import Batch, to_uint8, to_unit_range

MAX_TERMS, MAX_EXAMPLES = 12, 4
CELL_PX, CAPTION_LINES, LINE_PX, GAP_PX, COLUMNS = 128, 3, 12, 6, 4
GREY = "#e8e8e8"
OTHER_FILE = "choose another file with out=FILE"


@dataclass
class Findings:
    """What was seen: original sizes (height, width), how many are upscaled, caption lengths in characters, rejects.

    ``references`` counts samples by their number of references.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    upscaled: int = 0
    rejected: Tally = field(default_factory=Tally)
    buckets: Counter[tuple[int, int]] = field(default_factory=Counter)
    references: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, seen: Seen | None, rejects: list[Rejected]) -> None:
        found = Tally.of(rejects)
        self.rejected.add(found.counts, found.examples)
        if seen is not None:
            height, width, _, _, target_height, target_width = seen.size_6
            self.sizes.append((height, width))
            self.upscaled += height < target_height or width < target_width
            self.buckets[target_width, target_height] += 1
            self.references[seen.references] += 1
            self.captions.append(seen.letters)


class Seen(NamedTuple):
    """A good sample: its size condition, its number of references, and the length of its caption."""

    key: str
    size_6: list[int]
    references: int
    letters: int


@dataclass
class Reading(IterableDataset[tuple[Seen | None, list[Rejected]]]):
    """One pass: every good sample once, with the rejects that come with it; each data worker reads its own shards."""

    order: Order
    preparation: Any

    def __iter__(self) -> Iterator[tuple[Seen | None, list[Rejected]]]:
        share, order = Share().in_worker(), self.order
        shards = [(source, shard) for source in order.sources for shard in source.shards]
        for source, shard in shards[share.worker :: share.workers]:
            rest: list[Rejected] = []
            for slot in order.of_shards(source, [shard], rest):
                try:
                    sample = self.preparation.sample(slot.record, order.address(slot), order.target(slot.record))
                except Rejected as reject:
                    yield None, [*slot.record.rejects, reject.at()]
                    continue
                seen = Seen(slot.record.key, sample.size_6.tolist(), 1 + len(sample.more_references), len(sample.text))
                yield seen, slot.record.rejects
            yield None, rest


def inspect(cfg: DictConfig) -> None:
    """Print what was found and write the contact sheet; raises UserError."""
    data: Any = instantiate(cfg.data)
    if not isinstance(data, ShardDataModule):
        raise UserError("a feature cache holds no pictures: give the data that it was made from")
    data.batch_size = min(16, cfg.pictures)
    data.fit_to(
        image_size_px=cfg.image_size_px or read_from(cfg.base, "read_image_size_px"),
        reference_size_px=read_from(cfg.encoder, "read_widths").image_size_px,
        latent_shape=(1, 8, 8),  # of the noise, which is not looked at
    )
    findings = read(data, cfg.samples)
    if not findings.sizes:
        raise UserError(f"there is no good sample in these shards: {str(findings.rejected) or 'they are empty'}")
    print(describe(findings, data.num_workers))
    for line in describe_stripped(data, cfg.samples):
        print(line)
    data.num_workers = 0  # the first samples that a training in one process sees
    rows = ((batch, row) for batch in data.train_dataloader() for row in range(len(batch)))
    cells = [draw_cell(batch, row) for batch, row in islice(rows, cfg.pictures)]
    lines = [cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)]
    sheet = grid(lines, [""] * len(lines), [""] * len(lines[0]))
    write_atomically(Path(cfg.out), lambda temporary: sheet.save(temporary, format="PNG"), OTHER_FILE)
    print(f"wrote {cfg.out}")


def read(data: ShardDataModule, samples: int | None) -> Findings:
    """Every good sample once, or the first ``samples`` of all workers' shards."""
    findings = Findings()
    started = time.perf_counter()
    loader = DataLoader(Reading(data.train_order, data.train_preparation()), None, num_workers=data.num_workers)
    with tqdm(total=samples, unit=" samples", desc="reading") as bar:
        for seen, rejects in loader:
            findings.add(seen, rejects)
            bar.update(seen is not None)
            if samples is not None and len(findings.sizes) >= samples:
                break
    findings.seconds = time.perf_counter() - started
    return findings


def describe(findings: Findings, workers: int) -> str:
    """The findings as lines for the console."""
    good, bad = len(findings.sizes), findings.rejected.counts.total()
    lines = [
        f"{good:,} good samples, {bad:,} rejected ({100 * bad / (good + bad):.1f} %)",
        *(f"    {line}" for line in findings.rejected.lines()),
        quantiles("shorter side (px)", [min(size) for size in findings.sizes]),
        *describe_upscaled(findings),
        quantiles("aspect ratio", [max(size) / min(size) for size in findings.sizes]),
        quantiles("caption (characters)", findings.captions),
        f"{good / findings.seconds:,.0f} samples/s with {workers} workers, startup included",
    ]
    if len(findings.references) > 1:
        numbers = ", ".join(f"{number}: {count:,}" for number, count in sorted(findings.references.items()))
        lines.append(f"samples by number of references: {numbers}")
    if len(findings.buckets) > 1:
        most = ", ".join(f"{w} × {h}: {count:,}" for (w, h), count in findings.buckets.most_common(12))
        lines.append(f"buckets (width × height): {most}")
    return "\n".join(lines)


def describe_upscaled(findings: Findings) -> list[str]:
    """A line about pictures that are smaller than what training crops, if there are any."""
    if not findings.upscaled:
        return []
    width, height = findings.buckets.most_common(1)[0][0]
    return [
        f"{findings.upscaled:,} of them ({100 * findings.upscaled / len(findings.sizes):.0f} %) are smaller than what "
        f"training crops ({width} × {height} px) and are upscaled: use larger pictures, a smaller image_size_px, or "
        f"'data.filters={{small: {{key: short_side_px, min: {min(width, height)}}}}}'"
    ]


def quantiles(name: str, values: list[Any]) -> str:
    at = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0, 0.05, 0.5, 0.95, 1], dtype=torch.float64))
    low, few, middle, most, high = at.tolist()
    return f"{name}: median {middle:.4g}, 5 % below {few:.4g}, 5 % above {most:.4g}, from {low:.4g} to {high:.4g}"


@dataclass
class Stripped:
    """What ``data.pairs.strip`` takes out of the captions that are seen, and the first changes."""

    captions: int = 0
    changed: int = 0
    empty: int = 0
    terms: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, before: str, after: str, terms: list[str]) -> None:
        self.captions += 1
        self.changed += bool(terms)
        self.empty += bool(terms) and not after
        self.terms.update(term.lower() for term in terms)
        if terms and len(self.examples) < MAX_EXAMPLES:
            self.examples.append((before, after))

    def describe(self) -> list[str]:
        most = ", ".join(f"{term} ({times:,})" for term, times in self.terms.most_common(MAX_TERMS))
        return [
            f"data.pairs.strip changed {self.changed:,} of {self.captions:,} captions; {self.empty:,} are empty now",
            *([f"    removed: {most}"] if most else []),
            *(f"    {before!r} → {after!r}" for before, after in self.examples),
        ]


@dataclass(frozen=True)
class CountingStrip(Strip):
    stripped: Stripped = field(default_factory=Stripped, compare=False)

    def apply(self, text: str, fields: Fields) -> tuple[str, list[str]]:
        after, terms = super().apply(text, fields)
        self.stripped.add(text, after, terms)
        return after, terms


def describe_stripped(data: ShardDataModule, samples: int | None) -> list[str]:
    """Of the first ``samples`` in file order; nothing if nothing is stripped."""
    sources: Any = data.train_order.sources
    strip = sources[0].layout.strip
    if not strip.parts:
        return []
    counting = CountingStrip(strip.terms, strip.names)
    shards = ((shard, replace(source.layout, strip=counting)) for source in sources for shard in source.shards)
    records = (found for each in shards for found in read_shard(*each) if isinstance(found, Record))
    for _ in islice(records, samples):
        pass
    return counting.stripped.describe()


def draw_cell(batch: Batch, row: int) -> Image.Image:
    """Target and reference side by side, the caption below, in red what is dropped."""
    width = 2 * CELL_PX + GAP_PX
    cell = Image.new("RGB", (width, CELL_PX + (CAPTION_LINES + 1) * LINE_PX + GAP_PX), "white")
    for n, pixels_B3HW in enumerate((batch.image_B3HW, batch.reference_B3HW)):
        assert pixels_B3HW is not None, "only pictures can be shown"
        pixels_3HW = to_uint8(to_unit_range(pixels_B3HW[row]))  # normalised as for the model, and back
        picture = Image.fromarray(pixels_3HW.permute(1, 2, 0).numpy())
        cell.paste(ImageOps.pad(picture, (CELL_PX, CELL_PX), color=GREY), (n * (CELL_PX + GAP_PX), 0))
    pen = ImageDraw.Draw(cell)
    flags = {"text": batch.draws.drop_text_B, "image": batch.draws.drop_image_B}
    drops = [name for name, dropped_B in flags.items() if dropped_B[row]]
    pen.text((0, CELL_PX), f"{' and '.join(drops)} dropped" if drops else "", fill="red")
    for line, words in enumerate(textwrap.wrap(batch.text[row], width // 6)[:CAPTION_LINES], 1):
        pen.text((0, CELL_PX + line * LINE_PX), words, fill="black")
    return cell
