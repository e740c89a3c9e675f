"""What is in the shards: counts, rejects, sizes, caption lengths, and the speed of each stage."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from ipa.data.datamodule import ShardDataModule
from ipa.data.rejects import Examples, Rejected, add_examples, describe_rejects
from ipa.errors import UserError
from ipa.files import write_atomically
from ipa.tools.inspect.contact_sheet import draw_cell, tile
from ipa.tools.inspect.stripped import describe_stripped
from ipa.training.parts import read_widths
from ipa.types import Batch

TIMED_SAMPLES = 256
OTHER_FILE = "choose another file with out=FILE"


@dataclass
class Findings:
    """What was seen: original sizes (height, width), how many are upscaled, caption lengths in characters, rejects.

    ``references`` counts samples by their number of references.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    upscaled: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    reject_examples: Examples = field(default_factory=dict)
    buckets: Counter[tuple[int, int]] = field(default_factory=Counter)
    references: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, batch: Batch) -> None:
        assert batch.size_B6 is not None
        for height, width, _, _, target_height, target_width in batch.size_B6.tolist():
            self.sizes.append((height, width))
            self.upscaled += height < target_height or width < target_width
            self.buckets[target_width, target_height] += 1
        further = Counter([] if batch.more is None else batch.more.row_R.tolist())
        self.references.update(1 + further[row] for row in range(len(batch)))
        self.captions += map(len, batch.text)
        self.rejects.update(batch.rejects)
        add_examples(self.reject_examples, batch.reject_examples)


def inspect(cfg: DictConfig) -> None:
    """Print what was found and write the contact sheet; raises UserError."""
    data: Any = instantiate(cfg.data)
    if not isinstance(data, ShardDataModule):
        raise UserError("a feature cache holds no pictures: give the data that it was made from")
    data.batch_size = min(16, cfg.samples or 16)
    data.fit_to(
        image_size_px=cfg.image_size_px or read_image_size(cfg.base),
        reference_size_px=read_widths(cfg.encoder).image_size_px,
        latent_shape=(1, 8, 8),  # of the noise, which is not looked at
    )
    findings = read(data, cfg.samples)
    if not findings.sizes:
        raise UserError("there is no good sample in these shards; the log above says what was rejected, and why")
    print(describe(findings, data.num_workers))
    print(describe_speed(data))
    for line in describe_stripped(data, cfg.samples):
        print(line)
    sheet = tile([draw_cell(batch, row) for batch, row in first_rows(data, cfg.pictures)])
    write_atomically(Path(cfg.out), lambda temporary: sheet.save(temporary, format="PNG"), OTHER_FILE)
    print(f"wrote {cfg.out}")


def read_image_size(base: DictConfig) -> int:
    """The picture size that the base was trained at, from its configuration files."""
    return instantiate({**base, "_target_": base._target_.replace("from_pretrained", "read_image_size_px")})


def read(data: ShardDataModule, samples: int | None) -> Findings:
    """Every good sample once, or the first ``samples`` of all workers' shards."""
    findings = Findings()
    started = time.perf_counter()
    with tqdm(total=samples, unit=" samples", desc="reading") as bar:
        for batch in data.audit_dataloader():
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
        *(f"    {line}" for line in describe_rejects(findings.rejects, findings.reject_examples)),
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


def describe_speed(data: ShardDataModule) -> str:
    """Samples per second of one process in each stage alone, over the first samples in file order."""
    order, preparation = data.train_order, data.train_preparation()
    good: list[Any] = []

    def decode() -> None:
        for slot in slots:
            with suppress(Rejected):
                good.append(preparation.sample(slot.record, order.address(slot), slot.target))

    slots, reading_s = timed(lambda: list(islice(order.in_file_order(loud=False), TIMED_SAMPLES)))
    _, decoding_s = timed(decode)
    _, collating_s = timed(lambda: preparation.batch(good, [], None))
    rates = {"reading": len(slots) / reading_s, "decoding and cropping": len(good) / decoding_s}
    rates["sampling noise and collating"] = len(good) / collating_s
    return "one process, samples/s: " + ", ".join(f"{stage} {rate:,.0f}" for stage, rate in rates.items())


def timed(do: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return do(), time.perf_counter() - started


def first_rows(data: ShardDataModule, pictures: int) -> list[tuple[Batch, int]]:
    """The first samples that a training in one process sees, each as a row of its batch."""
    data.num_workers = 0
    rows = ((batch, row) for batch in data.train_dataloader() for row in range(len(batch)))
    return list(islice(rows, pictures))
