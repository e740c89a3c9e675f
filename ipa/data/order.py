"""The training order: an endless sequence of records, a pure function of seed, sources and lanes.

Pass e (its *epoch*) over a source reads the shards in an order of its own, dealt to the lanes, and permutes the records
within consecutive windows, each permutation with its own address. Records that can be seen to be unusable without
decoding the picture are left out here, so that every reader of the order numbers the rest alike.

Several sources are mixed by their weights: a draw at the lane's own address says whose turn it is. Each goes on with
its own passes, so a small source with a large weight comes round more often.

With aspect-ratio buckets a window is cut into groups of one bucket, as many samples as a step takes from the lane.
"""

from __future__ import annotations

import logging
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, dropwhile, islice
from typing import Protocol

from ipa.data.addresses import Address, Item, digest, permuted, uniform_at
from ipa.data.buckets import Buckets
from ipa.data.lanes import Lane
from ipa.data.records import Record
from ipa.data.rejects import BROKEN_TAR, Rejected, no_good_samples
from ipa.types import LanePlace, SourcePlace

log = logging.getLogger(__name__)


NOWHERE = LanePlace(0, ())


class Source(Protocol):
    """Shards that are read alike: ``read`` gives one in file order, ``fingerprint`` tells all that counts in it."""

    @property
    def name(self) -> str: ...

    @property
    def shards(self) -> list[str]: ...

    @property
    def weight(self) -> float: ...

    def read(self, shard: str) -> Iterator[Record | Rejected]: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Slot:
    """A place in the order, the record that lies there, and where the lane stands after it.

    ``target`` is the bucket that the picture is cut to (width and height); None is the training's square.
    """

    source: str
    epoch: int
    record: Record
    target: tuple[int, int] | None = None
    after: LanePlace = NOWHERE


@dataclass
class Order:
    """Where samples come from and how they follow each other.

    ``window`` is in records; each lane holds the bytes of that many (2048 pictures of 512 px are about 150 MB).
    """

    sources: Sequence[Source]
    seed: int
    window: int = 2048
    buckets: Buckets | None = None
    told: set[str] = field(default_factory=set, repr=False)

    @property
    def num_shards(self) -> int:
        return sum(len(source.shards) for source in self.sources)

    def begin(self, epoch: int = 0) -> LanePlace:
        """The beginning of pass ``epoch`` of every source."""
        return LanePlace(0, tuple(SourcePlace(epoch) for _ in self.sources))

    def lane(self, lane: Lane, take: int = 1, loud: bool = False) -> LaneOrder:
        """The part of the order that is one lane's; a step takes ``take`` samples from it."""
        return LaneOrder(self, lane, take, loud)

    def in_file_order(self, loud: bool = True) -> Iterator[Slot]:
        """One pass as the files lie; its epoch is 0, so that every time makes the same draws.

        Raises ``NoGoodSamples`` when there is no record in any shard.
        """
        rejects: list[Rejected] = []
        empty = True
        for source in self.sources:
            for slot in self.of_shards(source, source.shards, rejects, loud):
                empty = False
                yield slot
        if empty:
            raise no_good_samples(Counter(reject.reason for reject in rejects), self.num_shards)

    def of_shards(
        self, source: Source, shards: Sequence[str], rejects: list[Rejected], loud: bool = True
    ) -> Iterator[Slot]:
        """Some shards of a source, in file order; without a record all rejects are left in ``rejects``."""
        tell = self.tell if loud else lambda found: found
        pairs = ((0, tell(found)) for shard in shards for found in source.read(shard))
        return (Slot(source.name, 0, record) for _, record in hang_rejects(pairs, rejects))

    def target(self, record: Record) -> tuple[int, int] | None:
        """The bucket that fits a record best; None without buckets."""
        return None if self.buckets is None else self.buckets.nearest(record.size)

    def address(self, slot: Slot) -> Address:
        return Address(self.seed, slot.epoch, slot.source, slot.record.shard, slot.record.index)

    def fingerprint(self) -> str:
        """What positions depend on: equal fingerprints mean that a position is the same place."""
        sources = [part for source in self.sources for part in (source.name, repr(source.weight), source.fingerprint())]
        return f"{digest(self.seed, self.window, repr(self.buckets), *sources):016x}"

    def tell(self, found: Record | Rejected) -> Record | Rejected:
        """Warn of broken shards, once each."""
        if isinstance(found, Rejected) and found.reason == BROKEN_TAR and found.detail not in self.told:
            self.told.add(found.detail)
            log.warning("%s; what lies behind the break is left out: %s", found.reason, found.detail)
        return found


class LaneOrder:
    """One lane of an order: the sources' own orders, mixed by their weights."""

    def __init__(self, order: Order, lane: Lane, take: int, loud: bool) -> None:
        self.order, self.lane = order, lane
        self.run = take if order.buckets else 1  # samples for which one choice of the source holds
        self.sources = [SourceOrder(order, source, lane, take, loud) for source in order.sources]
        total = sum(source.weight for source in order.sources)
        self.borders = [border / total for border in accumulate(source.weight for source in order.sources)]

    def endless(self, start: LanePlace) -> Iterator[Slot]:
        """The lane's samples from ``start`` on; what lies before it in the open window is read but not decoded."""
        orders = [source.endless(place) for source, place in zip(self.sources, start.sources, strict=True)]
        places = list(start.sources)
        for number in count(start.choices):
            chosen = self.choose(number)
            for _ in range(self.run):
                slot, places[chosen] = next(orders[chosen])
                yield Slot(slot.source, slot.epoch, slot.record, slot.target, LanePlace(number + 1, tuple(places)))

    def choose(self, number: int) -> int:
        if len(self.sources) == 1:
            return 0
        u = uniform_at("source", self.order.seed, self.lane.number, self.lane.of, number)
        return min(bisect(self.borders, u), len(self.sources) - 1)


class SourceOrder:
    """The endless order of one source in one lane."""

    def __init__(self, order: Order, source: Source, lane: Lane, take: int, loud: bool) -> None:
        self.order, self.source, self.lane, self.take, self.loud = order, source, lane, take, loud

    def endless(self, start: SourcePlace) -> Iterator[tuple[Slot, SourcePlace]]:
        """Slots and the place after each. Raises ``NoGoodSamples`` when there is none in any shard."""
        rejects: list[Rejected] = []
        tried: set[str] = set()
        for epoch in count(start.epoch):
            begin = start if epoch == start.epoch else SourcePlace(epoch)
            shards = self.shards(epoch)
            empty = True
            for slot in self.one_pass(shards, begin, rejects):
                empty = False
                yield slot
            tried = tried | set(shards) if empty and begin == SourcePlace(epoch) else set()
            if tried.issuperset(self.source.shards):
                raise no_good_samples(Counter(reject.reason for reject in rejects), len(self.source.shards))

    def shards(self, epoch: int) -> Sequence[str]:
        """This lane's shards of a pass, in the pass's order."""
        return self.lane.deal(permuted(self.source.shards, "shards", self.order.seed, epoch, self.source.name))

    def one_pass(
        self, shards: Sequence[str], begin: SourcePlace, rejects: list[Rejected]
    ) -> Iterator[tuple[Slot, SourcePlace]]:
        """The rest of a pass from ``begin``; ``rejects`` of passes without a record wait for the next one."""
        records = self.records(shards, begin, rejects)
        while window := list(islice(records, self.order.window)):
            for offset, slot in islice(enumerate(self.shuffled(window, begin)), begin.offset, None):
                yield slot, begin._replace(offset=offset + 1)
            ordinal, last = window[-1]
            begin = SourcePlace(begin.epoch, ordinal, last.index + 1)

    def shuffled(self, window: list[tuple[int, Record]], begin: SourcePlace) -> list[Slot]:
        """A window's records in training order."""
        address = ("window", self.order.seed, begin.epoch, self.source.name, self.lane.number, self.lane.of)
        records = permuted([record for _, record in window], *address, begin.shard, begin.record)
        if self.order.buckets is None:
            return [Slot(self.source.name, begin.epoch, record) for record in records]
        arranged = self.order.buckets.arrange([record.size for record in records], self.take)
        return [Slot(self.source.name, begin.epoch, records[i], target) for group, target in arranged for i in group]

    def records(
        self, shards: Sequence[str], begin: SourcePlace, rejects: list[Rejected]
    ) -> Iterator[tuple[int, Record]]:
        """Records with the number of their shard in the pass; shards before the place are not opened."""
        pairs = ((n, found) for n, shard in islice(enumerate(shards), begin.shard, None) for found in self.read(shard))

        def is_behind(pair: tuple[int, Record | Rejected]) -> bool:
            """Rejects on the way to the first record hang on the one before, and were counted with it."""
            number, found = pair
            return isinstance(found, Rejected) or (number == begin.shard and found.index < begin.record)

        begins = begin.shard == begin.record == 0
        return hang_rejects(pairs if begins else dropwhile(is_behind, pairs), rejects)

    def read(self, shard: str) -> Iterator[Record | Rejected]:
        return map(self.order.tell, self.source.read(shard)) if self.loud else self.source.read(shard)


def hang_rejects(
    pairs: Iterable[tuple[int, Record | Rejected]], rejects: list[Rejected]
) -> Iterator[tuple[int, Record]]:
    """Hang every reject on the record before it, the first ones and what is in ``rejects`` on the first record.

    Without any record all rejects are left in ``rejects``.
    """
    held: tuple[int, Record] | None = None
    for number, found in pairs:
        if isinstance(found, Rejected):
            rejects.append(found)
            continue
        if held is not None:
            held[1].rejects = rejects[:]
            rejects.clear()
            yield held
        held = (number, found)
    if held is not None:
        held[1].rejects = rejects[:]
        rejects.clear()
        yield held


def chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(islice(items, size)):
        yield chunk
