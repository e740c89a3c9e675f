"""Shards in, feature shards out: the frozen parts, and all that is done with them."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ipa.data.cache.datamodule import frozen_choices
from ipa.data.cache.format import DTYPES, Header
from ipa.data.datamodule import ShardDataModule
from ipa.data.images.preparation import ImagePreparation
from ipa.data.records import Record
from ipa.data.shards.names import is_remote, some
from ipa.errors import UserError
from ipa.model import fingerprints
from ipa.tools.precomputing.claims import Claims, read_share
from ipa.tools.precomputing.decoding import Decoded, Decoding
from ipa.tools.precomputing.shards import Job, Plan
from ipa.training.parts import check_parts
from ipa.types import to_unit_range

log = logging.getLogger(__name__)

Item = TypeVar("Item")

# what is kept of a reference, by what the head reads: patch features take four times its room
KEPT = {"pooled": "pooled", "patches": "reference"}


class Encoding:
    """The frozen parts on their device: decoded pictures → what is kept of each, under the names of ``DTYPES``.

    ``kept`` says what of the reference: pooled embedding, reference, or both.
    """

    def __init__(self, family: Any, encoder: Any, kept: Sequence[str], device: torch.device) -> None:
        self.family, self.encoder, self.kept, self.device = family, encoder, kept, device
        family.vae.to(device)
        if "pooled" in kept:
            encoder.to(device)

    def encode(self, decoded: Decoded) -> dict[str, Tensor]:
        """A row for each good record; what the device computes may not be finished yet."""
        if decoded.image_B3HW is None or decoded.reference_B3HW is None or decoded.size_B6 is None:
            return {}
        posterior = self.family.encode_pixels(self.pixels(decoded.image_B3HW))
        found = {"mean_CHW": posterior.mean_BCHW, "logvar_CHW": posterior.logvar_BCHW, "size_6": decoded.size_B6}
        if "pooled" in self.kept:
            found["pooled_E"] = self.encoder.encode(self.pixels(decoded.reference_B3HW), "pooled").pooled_BE
        if "reference" in self.kept:
            found["reference_3HW"] = decoded.reference_B3HW
        return {name: tensor.to(DTYPES[name]) for name, tensor in found.items()}

    def pixels(self, image_B3HW: Tensor) -> Tensor:
        return to_unit_range(image_B3HW.to(self.device, non_blocking=True))

    def rows(self, records: Sequence[Record], tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """What is kept of each record: its row, and the ids of all its captions."""
        if not records:
            return []
        arrived = {name: tensor.cpu() for name, tensor in tensors.items()}
        check_finite(arrived, records)
        numbers = [len(record.captions) for record in records]
        texts = [text for record in records for text, _ in record.captions]
        prepared = {f"text.{name}": x.split(numbers) for name, x in self.family.prepare_text(texts).items()}
        return [
            {name: x[i] for name, x in arrived.items()} | {name: rows[i] for name, rows in prepared.items()}
            for i in range(len(records))
        ]


def check_finite(tensors: dict[str, Tensor], records: Sequence[Record]) -> None:
    for name, tensor in tensors.items():
        if not (finite_B := tensor.flatten(1).isfinite().all(1)).all():
            first = records[int(finite_B.int().argmin())]
            raise UserError(
                f"{first.shard}, key {first.key}: {name} has numbers that float16 does not hold, or that are none. "
                "A VAE that overflows needs base.vae_dtype=float32; an encoder, encoder.dtype=float32"
            )


def precompute(cfg: DictConfig) -> None:
    """Make the shards that are missing; raises UserError with a message for the user."""
    claims = Claims(read_share(cfg.rank, cfg.world, os.environ))
    check_options(cfg)
    data = open_data(cfg)
    check_parts(cfg)
    torch.set_float32_matmul_precision("high")  # as in training
    family, encoder = instantiate(cfg.base), instantiate(cfg.encoder)
    kept = list(cfg.keep or [KEPT[head_of(cfg, family, encoder).uses]])
    sizes = fit(data, family, encoder, cfg.image_size_px) | {"kept": kept}
    headers = make_headers(data, sizes, fingerprints(family, encoder))
    plan = Plan(data.train_order, headers, Path(cfg.out), claims, cfg.batch_size)
    encoding = Encoding(family, encoder, kept, to_device(cfg.device, os.environ))
    report(plan, make(plan, encoding, make_loader(plan, data.images, cfg.num_workers)))


def check_options(cfg: DictConfig) -> None:
    if is_remote(cfg.out):
        raise UserError(f"out={cfg.out}: give a folder, where a shard can get its name when it is whole")
    if cfg.batch_size < 1 or (cfg.num_workers or 0) < 0:
        raise UserError(f"batch_size={cfg.batch_size} num_workers={cfg.num_workers}: at least 1, and 0")
    unknown = set(cfg.keep or []) - set(KEPT.values())
    if unknown:
        raise UserError(f"keep={cfg.keep}: of {', '.join(KEPT.values())}, one or both; null keeps what the head reads")


def open_data(cfg: DictConfig) -> ShardDataModule:
    """Raises UserError for data that are no pictures, or random in what a cache freezes."""
    data = instantiate(cfg.data)
    if not isinstance(data, ShardDataModule):
        raise UserError("data=cache is what this command writes: give data=shards, or another that reads pictures")
    sources: Any = data.train_order.sources
    for source in sources:
        frozen_choices(data, source.layout)
    return data


def fit(data: ShardDataModule, family: Any, encoder: Any, image_size_px: int | None) -> dict[str, Any]:
    """Tell the data the sizes, and return them as the header has them."""
    edge = image_size_px or family.image_size_px
    shape = family.latent_shape(edge)
    data.fit_to(image_size_px=edge, reference_size_px=encoder.image_size_px, latent_shape=shape)
    return {"image_size_px": edge, "reference_size_px": encoder.image_size_px, "latent_shape": list(shape)}


def to_device(name: str | None, environment: Mapping[str, str]) -> torch.device:
    """The device asked for, else this process's GPU among those of its machine, else the CPU; raises UserError."""
    local = int(environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or 0)
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name or (f"cuda:{local % gpus}" if gpus else "cpu"))
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: {str(error).splitlines()[0]}") from error
    return device


def head_of(cfg: DictConfig, family: Any, encoder: Any) -> Any:
    with torch.device("meta"):
        return instantiate(cfg.tokens)(encoder.widths, family.context_width)


def make_headers(data: ShardDataModule, sizes: dict[str, Any], found: dict[str, str]) -> dict[str, Header]:
    """Source → header. An encoder that only the reference waits for may still change."""
    if "pooled" not in sizes["kept"]:
        found.pop("encoder")
    sources: Any = data.train_order.sources
    return {each.name: Header(each.name, found, frozen_choices(data, each.layout), sizes) for each in sources}


def make_loader(plan: Plan, preparation: ImagePreparation, num_workers: int | None) -> DataLoader[Decoded]:
    """Decoded tasks in the plan's order. Workers start before the first claim, which they would otherwise share."""
    if num_workers is None:
        num_workers = min(8, len(os.sched_getaffinity(0)))
    return DataLoader(
        Decoding(preparation),
        sampler=plan,
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def as_it_is(decoded: Any) -> Any:
    return decoded


@dataclass
class Made:
    """What this process has made; ``cut_off`` are shards that could not be read to their end."""

    shards: int = 0
    samples: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    cut_off: list[str] = field(default_factory=list)

    def add(self, job: Job) -> None:
        if job.cut_off:
            job.leave()
            self.cut_off.append(job.shard)
            return
        job.finish()
        self.shards += 1
        self.rejects += job.rejects


def make(plan: Plan, encoding: Encoding, loader: DataLoader[Decoded]) -> Made:
    """Write all that the plan gives out."""
    made = Made()
    try:
        with tqdm(unit=" samples", mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
            for decoded, tensors in one_behind((decoded, encoding.encode(decoded)) for decoded in loader):
                job = plan.jobs[0]
                job.add(decoded, encoding.rows(decoded.good, tensors))
                made.samples += len(decoded.good)
                bar.set_description(f"shard {job.number} of {len(plan.work)}", refresh=False)
                bar.update(len(decoded.good))
                if decoded.task.ends_shard:
                    made.add(plan.jobs.popleft())
    finally:
        for job in plan.jobs:
            job.leave()
    return made


def one_behind(items: Iterator[Item]) -> Iterator[Item]:
    """Each item once the next one is begun, so that the device is at work while this one is written."""
    held = next(items, None)
    for item in items:
        assert held is not None
        yield held
        held = item
    if held is not None:
        yield held


def report(plan: Plan, made: Made) -> None:
    """Tell what there is now; raises UserError for shards that broke off on their way here."""
    told = [f"{plan.out}: {made.shards} shards with {made.samples:,} samples made"]
    told += [f"{plan.found} were there"] * (plan.found > 0) + [f"{plan.taken} are other processes'"] * (plan.taken > 0)
    log.info(", ".join(told))
    if made.rejects:
        log.info("rejected: %s", ", ".join(f"{reason}: {number}" for reason, number in made.rejects.most_common()))
    if made.cut_off:
        raise UserError(
            f"{len(made.cut_off)} shards broke off while they were read ({some(made.cut_off)}) and were not kept; the "
            "same command tries them again"
        )
