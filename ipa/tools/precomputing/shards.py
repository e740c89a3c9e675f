"""Which shard becomes which file, in which parts it is worked on, and how the file is written."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from torch import Tensor

from ipa.data.cache.format import CacheWriter, Header, WrongCache
from ipa.data.cache.source import read_header
from ipa.data.order.sequence import Order, Slot, chunks
from ipa.data.records import Record, Source
from ipa.data.rejects import BROKEN_TAR, Rejected
from ipa.data.shards.names import is_remote, shard_name
from ipa.errors import UserError
from ipa.tools.precomputing.claims import Claim, Claims, tidy
from ipa.tools.precomputing.decoding import Decoded, Task

WINDOW = 16  # batches that are read before they are sorted into aspect buckets
Target = tuple[int, int] | None


@dataclass
class Job:
    """One shard in the making, the ``number``-th that this process came to.

    Samples wait until their window is whole, and are written in file order.
    """

    claim: Claim
    shard: str
    number: int
    file: IO[bytes]
    writer: CacheWriter
    rejects: Counter[str] = field(default_factory=Counter)
    waiting: dict[int, tuple[Record, Mapping[str, Tensor], Target]] = field(default_factory=dict)

    @property
    def cut_off(self) -> bool:
        """Whether reading broke off on the way here, which may go better next time."""
        return self.rejects[BROKEN_TAR] > 0 and is_remote(self.shard)

    def add(self, decoded: Decoded, rows: Sequence[Mapping[str, Tensor]]) -> None:
        """``rows`` are what is kept of the good records."""
        self.rejects.update(record.broken.reason for record in decoded.broken if record.broken)
        self.waiting |= {record.index: (record, {}, None) for record in decoded.broken}
        for record, row in zip(decoded.good, rows, strict=True):
            self.waiting[record.index] = (record, row, decoded.task.target)
        if decoded.task.ends_window:
            self.write()

    def write(self) -> None:
        for _, (record, row, target) in sorted(self.waiting.items()):
            if record.broken:
                self.writer.rejected(record, record.broken.reason)
            else:
                self.writer.sample(record, row, target)
        self.waiting.clear()

    def finish(self) -> None:
        """Give the whole shard its name."""
        self.writer.close(self.rejects)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.claim.finish()

    def leave(self) -> None:
        """Nothing of an unfinished shard stays."""
        self.file.close()
        self.claim.beside.unlink(missing_ok=True)
        self.claim.drop()


@dataclass
class Plan:
    """All shards of an order, to be made into files of the folder ``out`` that begin with their source's header.

    Iterating gives the tasks of those that are not done and that nobody else has; they are claimed on the way, and
    ``jobs`` are those whose tasks have been given out. Which records are encoded together depends on the shard alone.
    """

    order: Order
    headers: Mapping[str, Header]
    out: Path
    claims: Claims
    batch_size: int
    jobs: deque[Job] = field(default_factory=deque)
    found: int = 0
    taken: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for two shards of one name, which would have the same draws, too."""
        self.work = [(source, shard) for source in self.order.sources for shard in source.shards]
        for path, number in Counter(self.path(*each) for each in self.work).items():
            if number > 1:
                raise UserError(f"{number} shards are called {path.name}: make caches of them one by one")

    def path(self, source: Source, shard: str) -> Path:
        """Several sources have folders of their own."""
        folder = self.out if len(self.order.sources) == 1 else self.out / source.name
        return folder / shard_name(shard)

    def __iter__(self) -> Iterator[Task]:
        for number, (source, shard) in enumerate(self.claims.order(self.work), 1):
            job = self.begin(source, shard, number)
            if job is not None:
                self.jobs.append(job)
                yield from self.tasks(job, source)

    def begin(self, source: Source, shard: str, number: int) -> Job | None:
        """None when the shard is done, or another process has it."""
        path = self.path(source, shard)
        if self.is_done(path, source):
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        claim = self.claims.claim(path)
        if claim is None:
            self.taken += 1
            return None
        if self.is_done(path, source):  # another process finished it just now
            claim.drop()
            return None
        file = claim.beside.open("wb")
        return Job(claim, shard, number, file, CacheWriter(file, self.headers[source.name]))

    def is_done(self, path: Path, source: Source) -> bool:
        """Raises ``WrongCache`` when what is there was made in another way."""
        if not path.exists():
            return False
        differences = read_header(str(path)).differences(self.headers[source.name])
        if differences:
            raise WrongCache(
                f"{path} is there already, made in another way: {'; '.join(differences)}. Give another out=, or remove "
                "that folder"
            )
        self.found += 1
        tidy(path)
        return True

    def tasks(self, job: Job, source: Source) -> Iterator[Task]:
        leftover: list[Rejected] = []
        for window in chunks(self.order.of_shards(source, [job.shard], leftover), WINDOW * self.batch_size):
            job.rejects.update(reject.reason for slot in window for reject in slot.record.rejects)
            parts = self.parts(window)
            for number, (target, slots) in enumerate(parts, 1):
                records, addresses = [slot.record for slot in slots], [self.order.address(slot) for slot in slots]
                yield Task(records, addresses, target, ends_window=number == len(parts))
        job.rejects.update(reject.reason for reject in leftover)
        yield Task(ends_shard=True)

    def parts(self, window: Sequence[Slot]) -> list[tuple[Target, list[Slot]]]:
        """A window's records by aspect bucket, in batches."""
        by_target: dict[Target, list[Slot]] = {}
        for slot in window:
            by_target.setdefault(self.order.target(slot.record), []).append(slot)
        return [(target, part) for target, slots in by_target.items() for part in chunks(iter(slots), self.batch_size)]
