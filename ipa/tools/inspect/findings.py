"""What is in the shards: counts, rejects, sizes, captions, the speed, and a contact sheet."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from ipa.data.datamodule import ShardDataModule
from ipa.data.images.preparation import Sample
from ipa.data.order.lanes import Share
from ipa.data.order.sequence import Order
from ipa.data.records import Record
from ipa.data.rejects import Rejected, Tally
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


class Seen(NamedTuple):
    """A good sample: its original size and its target's (width, height), its references, letters of its caption."""

    key: str
    size: tuple[int, int]
    target: tuple[int, int]
    references: int
    letters: int

    @classmethod
    def of(cls, key: str, sample: Sample) -> Seen:
        height, width, _, _, *target = sample.size_6.tolist()
        return cls(key, (width, height), (target[1], target[0]), 1 + len(sample.more_references), len(sample.text))


@dataclass
class Findings:
    good: list[Seen] = field(default_factory=list)
    rejected: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    is_whole: bool = True


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
                yield Seen.of(slot.record.key, sample), slot.record.rejects
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
    if not findings.good:
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
            found = Tally.of(rejects)
            findings.rejected.add(found.counts, found.examples)
            findings.good += [] if seen is None else [seen]
            bar.update(seen is not None)
            if samples is not None and len(findings.good) >= samples:
                findings.is_whole = False
                break
    findings.seconds = time.perf_counter() - started
    return findings


def describe(findings: Findings, workers: int) -> str:
    good, bad = findings.good, findings.rejected.counts.total()
    buckets = Counter(tuple(seen.target) for seen in good)  # a list, from a data worker
    references = Counter(seen.references for seen in good)
    lines = [
        f"{len(good):,} good samples, {bad:,} rejected ({100 * bad / (len(good) + bad):.1f} %)"
        + ("" if findings.is_whole else f"; stopped at samples={len(good)}"),
        *(f"    {line}" for line in findings.rejected.lines()),
        quantiles("shorter side (px)", [min(seen.size) for seen in good]),
        *describe_upscaled(good, *buckets.most_common(1)[0][0]),
        quantiles("aspect ratio", [max(seen.size) / min(seen.size) for seen in good]),
        quantiles("caption (characters)", [seen.letters for seen in good]),
        f"{len(good) / findings.seconds:,.0f} samples/s with {workers} workers, startup included",
    ]
    if len(references) > 1:
        numbers = ", ".join(f"{number}: {count:,}" for number, count in sorted(references.items()))
        lines.append(f"samples by number of references: {numbers}")
    if len(buckets) > 1:
        most = ", ".join(f"{w} × {h}: {count:,}" for (w, h), count in buckets.most_common(12))
        lines.append(f"buckets (width × height): {most}")
    return "\n".join(lines)


def describe_upscaled(good: Sequence[Seen], width: int, height: int) -> list[str]:
    """A line about pictures that are smaller than what training crops, if there are any."""
    upscaled = sum(seen.size[0] < seen.target[0] or seen.size[1] < seen.target[1] for seen in good)
    return [
        f"{upscaled:,} of them ({100 * upscaled / len(good):.0f} %) are smaller than what training crops ({width} × "
        f"{height} px) and are upscaled: use larger pictures, a smaller image_size_px, or "
        f"'data.filters={{small: {{key: short_side_px, min: {min(width, height)}}}}}'"
    ] * (upscaled > 0)


def quantiles(name: str, values: list[Any]) -> str:
    at = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0, 0.05, 0.5, 0.95, 1], dtype=torch.float64))
    low, few, middle, most, high = at.tolist()
    return f"{name}: median {middle:.4g}, 5 % below {few:.4g}, 5 % above {most:.4g}, from {low:.4g} to {high:.4g}"


def describe_stripped(data: ShardDataModule, samples: int | None) -> list[str]:
    """What ``data.pairs.strip`` takes out of the captions of the first ``samples`` in file order, if anything."""
    sources: Any = data.train_order.sources
    strip = sources[0].layout.strip
    if not strip.parts:
        return []
    layouts = [replace(source.layout, strip=Strip(), columns=strip.names) for source in sources]
    shards = ((shard, layout) for source, layout in zip(sources, layouts, strict=True) for shard in source.shards)
    records = (found for each in shards for found in read_shard(*each) if isinstance(found, Record))
    number, changed, removed = 0, list[tuple[str, str]](), Counter[str]()
    for record in islice(records, samples):
        for before, _ in record.captions:
            after, terms = strip.apply(before, record.values)
            number += 1
            changed += [(before, after)] * bool(terms)
            removed.update(term.lower() for term in terms)
    most = ", ".join(f"{term} ({times:,})" for term, times in removed.most_common(MAX_TERMS))
    empty = sum(not after for _, after in changed)
    return [
        f"data.pairs.strip changed {len(changed):,} of {number:,} captions; {empty:,} are empty now",
        *([f"    removed: {most}"] if most else []),
        *(f"    {before!r} → {after!r}" for before, after in changed[:MAX_EXAMPLES]),
    ]


def draw_square(pixels_3HW: Tensor) -> Image.Image:
    shown_3HW = to_uint8(to_unit_range(pixels_3HW))  # normalised as for the model, and back
    picture = Image.fromarray(shown_3HW.permute(1, 2, 0).numpy())
    return ImageOps.pad(picture, (CELL_PX, CELL_PX), color=GREY)


def draw_cell(batch: Batch, row: int) -> Image.Image:
    """Target and reference side by side, the caption below, in red what is dropped."""
    width = 2 * CELL_PX + GAP_PX
    cell = Image.new("RGB", (width, CELL_PX + (CAPTION_LINES + 1) * LINE_PX + GAP_PX), "white")
    for n, pixels_B3HW in enumerate((batch.image_B3HW, batch.reference_B3HW)):
        assert pixels_B3HW is not None, "only pictures can be shown"
        cell.paste(draw_square(pixels_B3HW[row]), (n * (CELL_PX + GAP_PX), 0))
    pen = ImageDraw.Draw(cell)
    flags = {"text": batch.draws.drop_text_B, "image": batch.draws.drop_image_B}
    drops = [name for name, dropped_B in flags.items() if dropped_B[row]]
    pen.text((0, CELL_PX), f"{' and '.join(drops)} dropped" if drops else "", fill="red")
    for line, words in enumerate(textwrap.wrap(batch.text[row], width // 6)[:CAPTION_LINES], 1):
        pen.text((0, CELL_PX + line * LINE_PX), words, fill="black")
    return cell
