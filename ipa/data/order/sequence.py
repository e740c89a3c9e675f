"""The training order: an endless sequence of records, a pure function of seed, sources and lanes.

Each pass (*epoch*) over a source permutes its shards, deals them to the lanes, and permutes the records within
consecutive windows. Every permutation has its own address. Records that are unusable even without decoding are left out
here, so that every reader gives the others the same numbers.

Several sources are mixed by their weights: a draw at the lane's own address chooses the next one. Each source has its
own passes, so a small source with a large weight is repeated more often.

With aspect-ratio buckets a window is split into groups of one bucket, as many samples as a step takes from the lane.
"""

from __future__ import annotations

import logging
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, count, dropwhile, islice

from ipa.data.addresses import Address, Item, digest, permuted, uniform_at
from ipa.data.images.buckets import Buckets
from ipa.data.order.lanes import Lane
from ipa.data.records import Record, Size, Source
from ipa.data.rejects import Rejected, no_good_samples
from ipa.types import LanePlace, SourcePlace

log = logging.getLogger(__name__)

NOWHERE = LanePlace(0, ())


@dataclass(frozen=True)
class Slot:
    """A position in the order, its record, and the lane's position after it.

    ``target`` is the bucket that the picture is cropped to; None is the training's square.
    """

    source: str
    epoch: int
    record: Record
    target: Size | None = None
    after: LanePlace = NOWHERE


@dataclass
class Order:
    """Which samples there are, and in which order.

    ``window`` is in records; each lane holds the bytes of that many (2048 pictures of 512 px are about 150 MB).
    """

    sources: Sequence[Source]
    seed: int
    window: int = 2048
    buckets: Buckets | None = None
    logged: set[str] = field(default_factory=set, repr=False)

    def begin(self, epoch: int = 0) -> LanePlace:
        """The start of pass ``epoch`` of every source."""
        return LanePlace(0, tuple(SourcePlace(epoch) for _ in self.sources))

    def in_file_order(self) -> Iterator[Slot]:
        """One pass in file order, always with the draws of epoch 0; raises ``NoGoodSamples`` without any record."""
        rejects: list[Rejected] = []
        empty = True
        for source in self.sources:
            for slot in self.of_shards(source, source.shards, rejects):
                empty = False
                yield slot
        if empty:
            raise no_good_samples(rejects, self.sources)

    def of_shards(self, source: Source, shards: Sequence[str], rejects: list[Rejected]) -> Iterator[Slot]:
        """Some shards of a source, in file order; without a record all rejects stay in ``rejects``."""
        pairs = ((0, found) for shard in shards for found in self.read(source, shard))
        return (Slot(source.name, 0, record) for _, record in attach_rejects(pairs, rejects))

    def read(self, source: Source, shard: str) -> Iterator[Record | Rejected]:
        """A shard's samples; each process that reads a broken shard logs it once."""
        for found in source.read(shard):
            if isinstance(found, Rejected) and found.is_break and found.detail not in self.logged:
                self.logged.add(found.detail)
                log.warning("%s, the rest of it is skipped: %s", found.reason, found.detail)
            if isinstance(found, Record):
                found.source = source.name
            yield found

    def target(self, record: Record) -> Size | None:
        """The best bucket for a record; None without buckets."""
        return None if self.buckets is None else self.buckets.nearest(record.size)

    def address(self, slot: Slot) -> Address:
        return Address(self.seed, slot.epoch, slot.source, slot.record.shard, slot.record.index)

    def fingerprint(self) -> str:
        """Covers everything that the meaning of a position depends on."""
        sources = [part for source in self.sources for part in (source.name, repr(source.weight), source.fingerprint())]
        return f"{digest(self.seed, self.window, repr(self.buckets), *sources):016x}"


@dataclass(frozen=True)
class LaneOrder:
    """One lane, from which a step takes ``take`` samples: the sources' own orders, mixed by their weights."""

    order: Order
    lane: Lane
    take: int

    def endless(self, start: LanePlace) -> Iterator[Slot]:
        """The lane's samples from ``start`` on; those before it in the open window are read but not decoded."""
        orders = [self.of_source(*each) for each in zip(self.order.sources, start.sources, strict=True)]
        places = list(start.sources)
        for number in count(start.choices):
            chosen = self.choose(number)
            for _ in range(self.take if self.order.buckets else 1):
                slot, places[chosen] = next(orders[chosen])
                yield replace(slot, after=LanePlace(number + 1, tuple(places)))

    def choose(self, number: int) -> int:
        weights = [source.weight for source in self.order.sources]
        if len(weights) == 1:
            return 0
        u, total = uniform_at("source", self.order.seed, *self.lane, number), sum(weights)
        return min(bisect([border / total for border in accumulate(weights)], u), len(weights) - 1)

    def of_source(self, source: Source, start: SourcePlace) -> Iterator[tuple[Slot, SourcePlace]]:
        """Slots and the position after each; raises ``NoGoodSamples`` if no shard has any."""
        rejects: list[Rejected] = []
        tried: set[str] = set()
        for epoch in count(start.epoch):
            begin = start if epoch == start.epoch else SourcePlace(epoch)
            shards = self.shards(source, epoch)
            empty = True
            for slot in self.one_pass(source, shards, begin, rejects):
                empty = False
                yield slot
            tried = tried | set(shards) if empty and begin == SourcePlace(epoch) else set()
            if tried.issuperset(source.shards):
                raise no_good_samples(rejects, [source])

    def shards(self, source: Source, epoch: int) -> Sequence[str]:
        shards = permuted(source.shards, "shards", self.order.seed, epoch, source.name)
        return shards[self.lane.number :: self.lane.of]

    def one_pass(
        self, source: Source, shards: Sequence[str], begin: SourcePlace, rejects: list[Rejected]
    ) -> Iterator[tuple[Slot, SourcePlace]]:
        """The rest of a pass from ``begin``; ``rejects`` keeps those of passes without a record for the next one."""
        records = self.records(source, shards, begin, rejects)
        while window := list(islice(records, self.order.window)):
            for offset, slot in islice(enumerate(self.shuffled(source, window, begin)), begin.offset, None):
                yield slot, begin._replace(offset=offset + 1)
            ordinal, last = window[-1]
            begin = SourcePlace(begin.epoch, ordinal, last.index + 1)

    def shuffled(self, source: Source, window: list[tuple[int, Record]], begin: SourcePlace) -> list[Slot]:
        address = ("window", self.order.seed, begin.epoch, source.name, self.lane.number, self.lane.of)
        records = permuted([record for _, record in window], *address, begin.shard, begin.record)
        if self.order.buckets is None:
            return [Slot(source.name, begin.epoch, record) for record in records]
        arranged = self.order.buckets.arrange([record.size for record in records], self.take)
        return [Slot(source.name, begin.epoch, records[i], target) for group, target in arranged for i in group]

    def records(
        self, source: Source, shards: Sequence[str], begin: SourcePlace, rejects: list[Rejected]
    ) -> Iterator[tuple[int, Record]]:
        """Records with the number of their shard in the pass; shards before the position are not opened."""
        numbered = islice(enumerate(shards), begin.shard, None)
        pairs = ((n, found) for n, shard in numbered for found in self.order.read(source, shard))

        def is_behind(pair: tuple[int, Record | Rejected]) -> bool:
            """Rejects before the first record belong to the record before them, and were counted with it."""
            number, found = pair
            return isinstance(found, Rejected) or (number == begin.shard and found.index < begin.record)

        begins = begin.shard == begin.record == 0
        return attach_rejects(pairs if begins else dropwhile(is_behind, pairs), rejects)


def attach_rejects(
    pairs: Iterable[tuple[int, Record | Rejected]], rejects: list[Rejected]
) -> Iterator[tuple[int, Record]]:
    """Attach every reject to the record before it; the first ones, and those in ``rejects``, to the first record.

    Without any record all of them are left in ``rejects``.
    """
    held: tuple[int, Record] | None = None
    for number, found in chain(pairs, [(0, None)]):
        if isinstance(found, Rejected):
            rejects.append(found)
            continue
        if held is not None:
            held[1].rejects = rejects[:]
            rejects.clear()
            yield held
        if found is not None:
            held = (number, found)


def chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(islice(items, size)):
        yield chunk
