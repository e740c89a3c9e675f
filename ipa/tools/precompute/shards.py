"""Which shards a process makes, how their pictures are decoded in data workers, and how a feature shard is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ipa.data.addresses import Address
from ipa.data.cache.format import CacheWriter, Header, WrongCache
from ipa.data.cache.source import read_header
from ipa.data.images.preparation import ImagePreparation, Sample
from ipa.data.order.sequence import Order, Slot, chunks
from ipa.data.records import Record, Source, stack_masks
from ipa.data.rejects import Reason, Rejected, Tally
from ipa.data.shards.names import is_remote, shard_name
from ipa.errors import UserError
from ipa.files import write_atomically

WITHOUT_STATES = ".without_states"  # folder of shards that wait for the text's pass
WINDOW = 16  # batches that are read before they are sorted into aspect-ratio buckets
OTHER_FOLDER = "choose another folder with out=FOLDER"
# who starts several processes sets their rank and number; a batch script without srun has no SLURM_STEP_NUM_TASKS
LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))

Target = tuple[int, int] | None  # width and height of an aspect-ratio bucket; None is the square
Rows = Sequence[Mapping[str, Tensor]]  # what is kept of each record


class CutOff(Exception):
    """A remote shard broke off while it was read; another attempt may succeed."""


def read_share(rank: int | None, world: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and world: as given, else as torchrun or Slurm set them, else 0 and 1. Raises UserError for half of it."""
    for names in LAUNCHERS:
        if rank is None and world is None and all(name in environment for name in names):
            rank, world = (int(environment[name]) for name in names)
    if rank is None and world is None:
        return 0, 1
    if rank is None or world is None or not 0 <= rank < world:
        raise UserError(f"rank={rank} world={world}: give both or neither, the rank from 0 to world - 1")
    return rank, world


@dataclass(frozen=True)
class Job:
    """A shard of a source, and the file that its features go to, with token ids or the text states ``text``.

    ``header`` is that of a shard with ids.
    """

    source: Source
    shard: str
    path: Path
    header: Header
    text: str = "ids"

    @property
    def without_states(self) -> Job:
        """What the pictures' pass makes: a shard with ids, which the text's pass then reads."""
        if self.text == "ids":
            return self
        return replace(self, path=self.path.parent / WITHOUT_STATES / self.path.name, text="ids")

    def is_done(self) -> bool:
        """Raises ``WrongCache`` if the file was made in another way."""
        if not self.path.exists():
            return False
        found = read_header(str(self.path))
        kept = (found.sizes.get("text") or {"kept": "ids"})["kept"]
        differences = found.with_ids().differences(self.header)
        if differences := differences + [f"text: {kept}, here {self.text}"] * (kept != self.text):
            raise WrongCache(
                f"{self.path} was made in another way: {'; '.join(differences)}. Choose another folder with out=, or "
                "remove this one"
            )
        return True


def list_jobs(order: Order, headers: Mapping[str, Header], out: Path, text: str = "ids") -> list[Job]:
    """One per shard; with several sources each has its own folder. Raises UserError for two files of one name."""
    folders = {source.name: out if len(order.sources) == 1 else out / source.name for source in order.sources}
    jobs = [
        Job(source, shard, folders[source.name] / shard_name(shard), headers[source.name], text)
        for source in order.sources
        for shard in source.shards
    ]
    for path, number in Counter(job.path for job in jobs).items():
        if number > 1:
            raise UserError(f"{number} shards are called {path.name}: precompute them separately")
    return jobs


@dataclass
class Task:
    """Records of one bucket to decode together. The last task of a shard has none, but all that reading rejected."""

    records: list[Record] = field(default_factory=list)
    addresses: list[Address] = field(default_factory=list)
    target: Target = None
    ends_window: bool = False
    ends_shard: bool = False
    rejects: list[Rejected] = field(default_factory=list)


class Decoded(NamedTuple):
    """The result of a task: the rows of ``tensors`` belong to ``good``; ``broken`` could not be decoded."""

    task: Task
    good: list[Record]
    broken: list[Record]
    tensors: dict[str, Tensor]


class Decoding(Dataset[Decoded]):
    """Indexed by tasks. The records come back without their pictures."""

    def __init__(self, preparation: ImagePreparation) -> None:
        self.preparation = preparation

    def __getitem__(self, task: Task) -> Decoded:
        samples: list[Sample] = []
        decoded = Decoded(replace(task, records=[], addresses=[]), [], [], {})
        for record, address in zip(task.records, task.addresses, strict=True):
            light = replace(record, picture=b"", references=(), measured=record.size, rejects=[])
            light.loss_mask, light.reference_masks = None, ()
            try:
                samples.append(self.preparation.sample(record, address, task.target))
                decoded.good.append(light)
            except Rejected as reject:
                decoded.broken.append(replace(light, broken=reject.at()))
        for name in ("image_3HW", "reference_3HW", "size_6") if samples else ():
            decoded.tensors[name] = torch.stack([getattr(sample, name) for sample in samples])
        if (masks := stack_masks([sample.loss_mask_1HW for sample in samples])) is not None:
            decoded.tensors["mask_1HW"] = masks
        return decoded


def tasks_of(jobs: Iterable[Job], order: Order, batch_size: int) -> Iterator[Task]:
    """Which records are encoded together depends on their shard alone, so that the bytes are reproducible."""
    for job in jobs:
        rejects: list[Rejected] = []
        leftover: list[Rejected] = []
        for window in chunks(order.of_shards(job.source, [job.shard], leftover), WINDOW * batch_size):
            rejects += [reject for slot in window for reject in slot.record.rejects]
            parts = by_bucket(window, order, batch_size)
            for number, (target, slots) in enumerate(parts, 1):
                records, addresses = [slot.record for slot in slots], [order.address(slot) for slot in slots]
                yield Task(records, addresses, target, ends_window=number == len(parts))
        yield Task(ends_shard=True, rejects=rejects + leftover)


def by_bucket(window: Sequence[Slot], order: Order, batch_size: int) -> list[tuple[Target, list[Slot]]]:
    """Batches with one aspect-ratio bucket each."""
    buckets: dict[Target, list[Slot]] = {}
    for slot in window:
        buckets.setdefault(order.target(slot.record), []).append(slot)
    return [(target, part) for target, slots in buckets.items() for part in chunks(iter(slots), batch_size)]


@dataclass
class Made:
    """What this process has made; ``cut_off`` are shards that could not be read to their end."""

    shards: int = 0
    samples: int = 0
    size_bytes: int = 0
    rejected: Tally = field(default_factory=Tally)
    cut_off: list[str] = field(default_factory=list)

    def make(self, job: Job, encoded: Iterator[tuple[Decoded, Rows]], count: Callable[[int], object]) -> None:
        """Write one shard, from the part of ``encoded`` up to its end; ``count`` gets numbers of samples."""
        try:
            write_atomically(job.path, partial(self.write, job, encoded, count), OTHER_FOLDER)
        except CutOff:
            self.cut_off.append(job.shard)
            return
        self.shards += 1
        self.size_bytes += job.path.stat().st_size

    def write(
        self, job: Job, encoded: Iterator[tuple[Decoded, Rows]], count: Callable[[int], object], temporary: Path
    ) -> None:
        rejects: list[Rejected] = []
        waiting: dict[int, tuple[Record, Mapping[str, Tensor], Target]] = {}  # until their window is complete
        with temporary.open("wb") as file:
            writer = CacheWriter(file, job.header)
            for decoded, rows in encoded:
                rejects += decoded.task.rejects + [record.broken for record in decoded.broken if record.broken]
                waiting |= {record.index: (record, {}, None) for record in decoded.broken}
                for record, row in zip(decoded.good, rows, strict=True):
                    waiting[record.index] = (record, row, decoded.task.target)
                count(len(decoded.good))
                if decoded.task.ends_window:
                    write_in_order(writer, waiting)
                if decoded.task.ends_shard:
                    break
            found = Tally.of(rejects)
            if found.counts[Reason.BROKEN_TAR] and is_remote(job.shard):
                writer.tar.close()  # or it is closed after its file, which Python reports
                raise CutOff
            writer.close(found.counts)
        self.samples += writer.samples
        self.rejected.add(found.counts, found.examples)


def write_in_order(writer: CacheWriter, waiting: dict[int, tuple[Record, Mapping[str, Tensor], Target]]) -> None:
    """In file order, which buckets have changed."""
    for _, (record, row, target) in sorted(waiting.items()):
        if record.broken:
            writer.rejected(record, record.broken.reason)
        else:
            writer.sample(record, row, target)
    waiting.clear()
