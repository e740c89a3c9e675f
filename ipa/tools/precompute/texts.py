"""The text's pass: shards with token ids → the same shards with what the text encoders make of their captions.

It begins when VAE and image encoder are no longer needed, and reads no pictures.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from ipa.data.cache.format import HEADER, SAMPLE, CacheWriter, Header, WrongCache, entries_of, with_states
from ipa.data.cache.preparation import KEPT, cached_bytes, state_bytes
from ipa.data.cache.source import read_header
from ipa.data.cache.states import TEXTS, Texts, known_in, shapes_of, to_stored, without_unread
from ipa.data.datamodule import ShardDataModule
from ipa.data.order.lanes import Share
from ipa.data.order.sequence import chunks
from ipa.data.rejects import Rejected
from ipa.data.shards.tar import Member, read_members
from ipa.errors import UserError
from ipa.families.hollow import make_part
from ipa.families.sources import is_single_file, parts_in, read_index
from ipa.files import write_atomically
from ipa.tools.precompute.shards import OTHER_FOLDER, Job, Made
from ipa.training.dry_run import samples_in, size
from ipa.training.parts import make_head_of, read_from
from ipa.types import BaseWidths, EncoderWidths, TextInputs
from ipa.weights import fingerprint


def encode_texts(
    cfg: DictConfig, data: ShardDataModule, jobs: Sequence[Job], pictures: Made, device: torch.device
) -> Made:
    """Make the shards that are missing from those without states; ``pictures`` is what the other pass made."""
    texts, folders = fixed_texts(cfg, data), {job.path.parent for job in jobs}
    todo = [job for job in jobs if job.without_states.path.exists()]
    made = Made(rejected=pictures.rejected, cut_off=pictures.cut_off)
    if not todo and all(known is not None and known.has(texts) for known in map(known_in, folders)):
        return made
    free_memory()
    parts = TextParts(instantiate(cfg.base, leave_out=["denoiser", "vae"]), cfg.text, device, cfg.batch_size)
    for folder in folders:
        parts.write_texts(folder, texts)
    for job in jobs:
        if job not in todo and job.path.exists():
            parts.check(job)
    with tqdm(unit=" samples", mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        for number, job in enumerate(todo, 1):
            bar.set_description(f"texts of shard {number} of {len(todo)}", refresh=False)
            write_atomically(job.path, partial(parts.write, job, bar), OTHER_FOLDER)
            job.without_states.path.unlink()
            made.shards += 1
            made.size_bytes += job.path.stat().st_size
        made.samples = bar.n
    for folder in {job.without_states.path.parent for job in todo}:
        with suppress(OSError):  # another process still needs it
            folder.rmdir()
    return made


def free_memory() -> None:
    """Of the models of the first pass, which cycles of references keep until then."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fixed_texts(cfg: DictConfig, data: ShardDataModule) -> list[str]:
    """Texts that training encodes in addition to captions: the empty text, preview.text, held-out captions."""
    texts = ["", cfg.preview.text or ""]
    if cfg.heldout_check.every_n_steps is not None and data.val_order is not None:
        loader: Any = data.val_dataloader(Share())
        for batch in loader:
            texts += batch.text
            if len(texts) >= cfg.heldout_check.num_samples + 2:
                break
    return list(dict.fromkeys(texts))


class TextParts:
    """The text encoders on ``device``, which get up to ``batch_size`` texts at once."""

    def __init__(self, family: Any, kind: str, device: torch.device, batch_size: int) -> None:
        if not family.text_encoders:
            raise UserError(f"text={kind}: {family.title} has no text encoders of its own; give text=ids")
        self.family, self.kind, self.batch_size = family, kind, batch_size
        self.fingerprint = ", ".join(fingerprint(part.to(device)) for part in family.text_encoders)
        self.shapes = shapes_of(self.encode([""]))

    def encode(self, texts: list[str]) -> TextInputs:
        """On the CPU, zero where the denoiser does not read."""
        found = [self.encode_batch(list(part)) for part in chunks(iter(texts), self.batch_size)]
        return {name: torch.cat([states[name] for states in found]) for name in found[0]}

    def encode_batch(self, texts: list[str]) -> TextInputs:
        states = self.family.text_states(self.family.prepare_text(texts))
        read = without_unread(states, self.family.text_condition(states).mask_BL)
        return {name: x.to("cpu", torch.bfloat16 if x.is_floating_point() else None) for name, x in read.items()}

    def header(self, job: Job) -> Header:
        return job.header.with_states(self.kind, self.shapes, self.fingerprint)

    def check(self, job: Job) -> None:
        """Raise ``WrongCache`` for a shard that was made with other text encoders."""
        if differences := read_header(str(job.path)).differences(self.header(job)):
            raise WrongCache(f"{job.path} was made in another way: {'; '.join(differences)}. Remove it, or give out=")

    def write_texts(self, folder: Path, texts: list[str]) -> None:
        """Add to the folder's texts those that are not there yet."""
        known = known_in(folder) or Texts(self.fingerprint, {})
        if known.encoder != self.fingerprint:
            raise WrongCache(f"{folder / TEXTS} was made with other text encoders: {known.encoder}. Give another out=")
        if missing := [text for text in texts if text not in known.states]:
            states = self.encode(missing)
            rows = {text: {name: x[i] for name, x in states.items()} for i, text in enumerate(missing)}
            content = Texts(self.fingerprint, {**known.states, **rows}).written()
            write_atomically(folder / TEXTS, lambda temporary: temporary.write_bytes(content), OTHER_FOLDER)

    def write(self, job: Job, bar: Any, temporary: Path) -> None:
        with temporary.open("wb") as file:
            writer = CacheWriter(file, self.header(job))
            members = (each for each in whole_members(job.without_states.path) if each.name != HEADER)
            for part in chunks(members, self.batch_size):
                for member, content in zip(part, self.with_states(part), strict=True):
                    key, extension = base_plus_ext(member.name)
                    writer.add(key or "", extension or "", content)
                    bar.update(extension == SAMPLE)
            writer.tar.close()

    def with_states(self, members: Sequence[Member]) -> Iterator[bytes]:
        """The members' contents, those of samples with states of all their captions in place of ids."""
        captions = [captions_of(member) for member in members]
        texts = [text for each in captions for text in each]
        states = self.encode(texts) if texts else {}
        split = {name: iter(x.split([len(each) for each in captions])) for name, x in states.items()}
        for member, own in zip(members, captions, strict=True):
            rows = {name: next(each) for name, each in split.items()}
            yield with_states(member.content, to_stored(rows, self.kind)) if own else member.content


def captions_of(member: Member) -> list[str]:
    """None of members that are no samples."""
    if base_plus_ext(member.name)[1] != SAMPLE:
        return []
    return [text for text, _ in entries_of(member.content)[0]["captions"]]


def whole_members(path: Path) -> Iterator[Member]:
    """Of a shard that this command wrote; raises UserError if it was damaged since."""
    for member in read_members(str(path)):
        if isinstance(member, Rejected):
            raise UserError(f"{path} is damaged ({member.detail}): remove it, and repeat the command")
        yield member


def describe_sizes(cfg: DictConfig, data: ShardDataModule) -> str:
    """How much disk the cache takes; no weight of a folder or hub id is read for it."""
    family: Any = instantiate(cfg.base, leave_out=["text", "denoiser", "vae"])
    encoder = read_from(cfg.encoder, "read_widths")
    latent_shape = family.latent_shape(cfg.image_size_px or family.image_size_px)
    sample = cached_bytes(latent_shape, encoder, kept_of(cfg, encoder, family.widths))
    caption = text_bytes(cfg, family)
    shards = [Path(shard) for source in data.train_order.sources for shard in source.shards]
    number = samples_in(shards)
    each = f"each sample takes {size(sample)}, each of its captions at most {size(caption)} of {cfg.text}"
    if number is None:
        return f"{each}; {len(shards):,} shards, of an unknown number of samples"
    total = number * (sample + caption)
    return f"{each}: {size(total)} for {number:,} samples with a caption each, in {len(shards):,} shards"


def kept_of(cfg: DictConfig, encoder: EncoderWidths, base: BaseWidths) -> list[str]:
    """What is kept of each reference: as asked, else what the head reads."""
    return list(cfg.keep or [KEPT[make_head_of(cfg, encoder, base).uses]])


def text_bytes(cfg: DictConfig, family: Any) -> int:
    """Of a caption, nothing left out; of text states from configuration alone."""
    inputs = family.prepare_text([""])
    if cfg.text == "ids":
        return sum(4 * ids.numel() for ids in inputs.values())
    shapes = shapes_of_states(cfg.base, family, inputs)
    if cfg.text == "states":
        return state_bytes(shapes)
    return sum(
        math.prod(shape) + 4 * shape[0] if len(shape) == 2 else 2 * math.prod(shape) for shape in shapes.values()
    )


def shapes_of_states(base: DictConfig, family: Any, inputs: TextInputs) -> dict[str, list[int]]:
    layout = base.get("config") if is_single_file(base.path) else base.path
    index = read_index(layout, "base.path") if layout else {}
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes without content: text encoders of no weight
        for name in (name for name in parts_in(index) if name.startswith("text_encoder")):
            setattr(family, name, make_part(layout, name, *index[name]))
        return shapes_of(family.text_states(inputs))
