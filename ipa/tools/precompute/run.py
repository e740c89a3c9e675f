"""Encode pictures with the frozen parts, and write feature shards."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ipa.data.cache.datamodule import frozen_choices
from ipa.data.cache.format import DTYPES, KINDS, TEXT, Header
from ipa.data.cache.preparation import KEPT
from ipa.data.datamodule import ShardDataModule
from ipa.data.images.preparation import ImagePreparation
from ipa.data.pairs.options import UNPAIRED
from ipa.data.records import Record
from ipa.data.shards.names import is_remote, some
from ipa.errors import UserError
from ipa.files import remove_temporaries
from ipa.tools.precompute.shards import Decoded, Decoding, Job, Made, Rows, Task, list_jobs, read_share, tasks_of
from ipa.tools.precompute.texts import describe_sizes, encode_texts, kept_of
from ipa.training.parts import check_parts
from ipa.types import first_not_finite, to_unit_range

log = logging.getLogger(__name__)


def precompute(cfg: DictConfig) -> None:
    """Make the shards that are missing; raises UserError.

    One pass over the pictures with VAE and image encoder, then one over the captions with the text encoders, if states
    are kept. The denoiser is not loaded.
    """
    rank, world = read_share(cfg.rank, cfg.world, os.environ)
    check_options(cfg)
    data = open_data(cfg)
    check_parts(cfg)
    if cfg.dry_run or cfg.text != "ids":
        log.info("%s", describe_sizes(cfg, data))
    if cfg.dry_run:
        return
    torch.set_float32_matmul_precision("high")  # as in training
    device = to_device(cfg.device, os.environ)
    jobs, made = encode_pictures(cfg, data, rank, world, device)
    mine, others = jobs[rank::world], [job for number, job in enumerate(jobs) if number % world != rank]
    if cfg.text != "ids":
        made = encode_texts(cfg, data, mine, made, device)
    report(cfg.out, made, len(mine) - made.shards, [job for job in others if not job.path.exists()])


def encode_pictures(
    cfg: DictConfig, data: ShardDataModule, rank: int, world: int, device: torch.device
) -> tuple[list[Job], Made]:
    """All jobs, and what this process made of its own."""
    family: Any = instantiate(cfg.base, leave_out=["text", "denoiser"])
    encoder = instantiate(cfg.encoder)
    kept = kept_of(cfg, encoder.widths, family.widths)
    sizes = fit(data, family, encoder, cfg.image_size_px) | {"kept": kept}
    headers = make_headers(data, sizes, family.fingerprints() | {"encoder": encoder.fingerprint()})
    jobs = list_jobs(data.train_order, headers, Path(cfg.out), cfg.text)
    mine = jobs[rank::world]
    remove_temporaries(each.path for job in mine for each in (job, job.without_states))
    todo = [job.without_states for job in mine if not job.is_done()]
    todo = [job for job in todo if not job.is_done()]
    tasks = tasks_of(todo, data.train_order, cfg.batch_size)
    loader = make_loader(tasks, data.images, cfg.num_workers)
    return jobs, make_all(todo, FrozenParts(family, encoder, kept, device).encode_all(loader))


def make_all(jobs: Sequence[Job], encoded: Iterator[tuple[Decoded, Rows]]) -> Made:
    made = Made()
    with tqdm(unit=" samples", mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        for number, job in enumerate(jobs, 1):
            bar.set_description(f"shard {number} of {len(jobs)}", refresh=False)
            made.make(job, encoded, bar.update)
    return made


def report(out: str, made: Made, found: int, missing: Sequence[Job]) -> None:
    """Log what there is now; raises UserError for shards that broke off while they were read."""
    lines = [f"{out}: {made.shards} shards with {made.samples:,} samples made, {made.size_bytes / 1e6:,.1f} MB"]
    lines += [f"{found} shards were complete"] * (found > 0)
    lines += [f"{len(missing)} shards are left to other processes"] * (len(missing) > 0)
    log.info(", ".join(lines))
    for line in made.rejected.lines():
        log.info("rejected: %s", line)
    if made.cut_off:
        raise UserError(
            f"{len(made.cut_off)} shards broke off while they were read ({some(made.cut_off)}) and were not kept. "
            "Repeat the command to try them again"
        )


class FrozenParts:
    """Family and image encoder on their device: decoded pictures → what a cache keeps of each, as ``DTYPES`` has it.

    ``kept`` says what is kept of the reference: the pooled embedding, the reference itself, or both.
    """

    def __init__(self, family: Any, encoder: Any, kept: Sequence[str], device: torch.device) -> None:
        self.family, self.encoder, self.kept, self.device = family, encoder, kept, device
        family.vae.to(device)  # the other parts do nothing here
        if "pooled" in kept:
            encoder.to(device)

    def encode_all(self, loader: Iterable[Decoded]) -> Iterator[tuple[Decoded, Rows]]:
        """One batch behind, so that the device works on the next batch while the last one is written."""
        encoded = ((decoded, self.encode(decoded)) for decoded in loader)
        for (decoded, tensors), _ in pairwise(chain[Any](encoded, [None])):
            yield decoded, self.rows(decoded.good, tensors)

    def encode(self, decoded: Decoded) -> dict[str, Tensor]:
        """A row for each good record; the device may still be computing them."""
        if not decoded.good:
            return {}
        found = dict(decoded.tensors)
        posterior = self.family.encode_pixels(self.pixels(found.pop("image_3HW")))
        found |= {"mean_CHW": posterior.mean_BCHW, "logvar_CHW": posterior.logvar_BCHW}
        if "pooled" in self.kept:
            found["pooled_E"] = self.encoder.encode(self.pixels(found["reference_3HW"]), "pooled").pooled_BE
        if "reference" not in self.kept:
            del found["reference_3HW"]
        return {name: tensor.to(DTYPES[name]) for name, tensor in found.items()}

    def pixels(self, image_B3HW: Tensor) -> Tensor:
        return to_unit_range(image_B3HW.to(self.device, non_blocking=True))

    def rows(self, records: Sequence[Record], tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """What is kept of each record: its row of the tensors, and the text tensors of all its captions."""
        if not records:
            return []
        arrived = {name: tensor.cpu() for name, tensor in tensors.items()}
        check_finite(arrived, records)
        numbers = [len(record.captions) for record in records]
        texts = self.family.prepare_text([text for record in records for text, _ in record.captions])
        split = {f"{TEXT}{name}": tensor.split(numbers) for name, tensor in texts.items()}
        columns: dict[str, Any] = arrived | split
        return [{name: column[i] for name, column in columns.items()} for i in range(len(records))]


def check_finite(tensors: Mapping[str, Tensor], records: Sequence[Record]) -> None:
    if broken := first_not_finite(tensors):
        name, row = broken
        raise UserError(
            f"{records[row].shard}, key {records[row].key}: {name} has numbers that are not finite or too large for "
            "float16. Try base.vae_dtype=float32 if it is the VAE's, encoder.dtype=float32 if it is the encoder's"
        )


def check_options(cfg: DictConfig) -> None:
    if is_remote(cfg.out):
        raise UserError(f"out={cfg.out}: give a local folder, where a shard can be renamed when it is complete")
    if set(cfg.keep or []) - set(KEPT.values()):
        raise UserError(f"keep={cfg.keep}: one or both of {', '.join(KEPT.values())}; null keeps what the head reads")
    if cfg.text not in ("ids", *KINDS):
        raise UserError(f"text={cfg.text}: give one of ids, {', '.join(KINDS)}")


def open_data(cfg: DictConfig) -> ShardDataModule:
    """Raises UserError for data without pictures, or with random choices that a cache cannot hold."""
    # which samples are paired is decided in training
    data = instantiate(cfg.data, pairs=UNPAIRED)
    if not isinstance(data, ShardDataModule):
        raise UserError("data=cache is what this command writes: give data=shards, or another that reads pictures")
    sources: Any = data.train_order.sources
    for source in sources:
        frozen_choices(data, source.layout)
    return data


def fit(data: ShardDataModule, family: Any, encoder: Any, image_size_px: int | None) -> dict[str, Any]:
    """Set the sizes of the data, and return them for the header."""
    edge = image_size_px or family.image_size_px
    shape = family.latent_shape(edge)
    data.fit_to(image_size_px=edge, reference_size_px=encoder.image_size_px, latent_shape=shape)
    return {"image_size_px": edge, "reference_size_px": encoder.image_size_px, "latent_shape": list(shape)}


def to_device(name: str | None, environment: Mapping[str, str]) -> torch.device:
    """The given device, else this process's GPU of its machine, else the CPU; raises UserError."""
    local = int(environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or 0)
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name or (f"cuda:{local % gpus}" if gpus else "cpu"))
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: {str(error).splitlines()[0]}") from error
    return device


def make_headers(data: ShardDataModule, sizes: dict[str, Any], found: dict[str, str]) -> dict[str, Header]:
    """Source → header. Without pooled embeddings the encoder may change later."""
    if "pooled" not in sizes["kept"]:
        found.pop("encoder")
    sources: Any = data.train_order.sources
    return {each.name: Header(each.name, found, frozen_choices(data, each.layout), sizes) for each in sources}


def make_loader(tasks: Iterator[Task], preparation: ImagePreparation, num_workers: int | None) -> DataLoader[Decoded]:
    if num_workers is None:
        num_workers = min(8, len(os.sched_getaffinity(0)))
    loading: Any = {"batch_size": None, "num_workers": num_workers, "pin_memory": torch.cuda.is_available()}
    return DataLoader(Decoding(preparation), sampler=tasks, **loading)
