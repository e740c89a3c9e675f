"""The training order: an endless sequence of records, a pure function of seed, source and shards.

Pass e (its *epoch*) reads the shards in an order of its own and permutes the records within consecutive windows, each
permutation with its own address. Records that can be seen to be unusable without decoding the picture are left out
here, so that every reader of the order numbers the rest alike.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice

from ipa.data.addresses import Address, Item, digest, permuted
from ipa.data.records import Record, read_shard
from ipa.data.rejects import BROKEN_TAR, Rejected, no_good_samples
from ipa.data.shards import shard_name
from ipa.types import Position

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """A place in the order, and the record that lies there."""

    epoch: int
    offset: int
    record: Record


@dataclass
class Order:
    """Where samples come from and how they follow each other.

    ``window`` is in records; a reader holds the bytes of that many (2048 pictures of 512 px are about 150 MB). The
    reader that is ``loud`` warns of broken shards, once each.
    """

    shards: list[str]
    seed: int
    source: str
    caption_key: str = "txt"
    window: int = 2048
    loud: bool = False
    _told: set[str] = field(default_factory=set, repr=False)

    def endless(self, start: Position) -> Iterator[Slot]:
        """The training order from ``start`` on; what lies before it is read but not decoded."""
        for epoch in count(start.epoch):
            slots = (Slot(epoch, offset, record) for offset, record in enumerate(self.shuffled(epoch)))
            yield from islice(slots, start.offset if epoch == start.epoch else 0, None)

    def shuffled(self, epoch: int) -> Iterator[Record]:
        """One pass in training order."""
        shards = permuted(self.shards, "shards", self.seed, epoch, self.source)
        for number, window in enumerate(chunks(self.records(shards), self.window)):
            yield from permuted(window, "window", self.seed, epoch, self.source, number)

    def in_file_order(self) -> Iterator[Slot]:
        """One pass as the files lie; its epoch is 0, so that every validation makes the same draws."""
        for offset, record in enumerate(self.records(self.shards)):
            yield Slot(0, offset, record)

    def address(self, slot: Slot) -> Address:
        return Address(self.seed, slot.epoch, self.source, slot.record.shard, slot.record.index)

    def fingerprint(self) -> str:
        """What positions depend on: equal fingerprints mean that a position is the same place."""
        names = [shard_name(shard) for shard in self.shards]
        return f"{digest(self.seed, self.source, self.caption_key, self.window, *names):016x}"

    def records(self, shards: Iterable[str]) -> Iterator[Record]:
        found = chain.from_iterable(read_shard(shard, self.caption_key) for shard in shards)
        return with_rejects(map(self.tell, found), len(self.shards))

    def tell(self, found: Record | Rejected) -> Record | Rejected:
        if isinstance(found, Rejected) and found.reason == BROKEN_TAR:
            self.warn_once(found)
        return found

    def warn_once(self, broken: Rejected) -> None:
        if self.loud and broken.detail not in self._told:
            self._told.add(broken.detail)
            log.warning("%s; what lies behind the break is left out: %s", broken.reason, broken.detail)


def with_rejects(found: Iterable[Record | Rejected], shards: int) -> Iterator[Record]:
    """Hang every reject on the record before it (the first ones on the first record); raises when there is none."""
    held: Record | None = None
    rejects: list[Rejected] = []
    for item in found:
        if isinstance(item, Rejected):
            rejects.append(item)
            continue
        if held is not None:
            held.rejects, rejects = rejects, []
            yield held
        held = item
    if held is None:
        raise no_good_samples(Counter(reject.reason for reject in rejects), shards)
    held.rejects = rejects
    yield held


def chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(islice(items, size)):
        yield chunk
