"""The order → batches, sharded across ranks and data workers.

*Training* is endless. Step s takes G = world · batch size samples from its row of lanes: rank r makes every world-th
sample from r on, and worker w makes every workers-th of a rank's steps. So one process with batch size 2b sees in a
step what two with b see, and the number of workers only changes who opens which shard.

A slot whose picture is broken is filled with the next good record of its lane, which then occurs twice in that pass;
the draws stay the slot's own. This depends only on the data. So every rank makes equally many steps and waits for no
other, and a resumed run decodes nothing that comes before its position.

*Validation* is one pass in file order, in fixed batches, regardless of which rank makes them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

from torch.utils.data import IterableDataset

from ipa.data.order.lanes import Lane, Lanes, Share
from ipa.data.order.sequence import LaneOrder, Order, Slot, chunks
from ipa.data.records import Preparation
from ipa.data.rejects import Rejected, in_detail, no_good_samples
from ipa.types import Batch, Position

log = logging.getLogger(__name__)


class Lookahead:
    """An endless iterator with random access: ``ahead[i]`` is the i-th next item, ``drop`` advances."""

    def __init__(self, slots: Iterator[Slot]) -> None:
        self.slots = slots
        self.seen: deque[Slot] = deque()

    def __getitem__(self, i: int) -> Slot:
        while len(self.seen) <= i:
            self.seen.append(next(self.slots))
        return self.seen[i]

    def drop(self, number: int) -> None:
        for _ in range(number):
            _ = self[0]
            self.seen.popleft()


@dataclass(eq=False)
class Stream(IterableDataset[Batch]):
    """Batches of this process's ``share``, in a data worker its part of them."""

    order: Order
    preparation: Preparation
    batch_size: int
    share: Share = field(default_factory=Share)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(self.share.in_worker())

    def batches(self, share: Share) -> Iterator[Batch]:
        raise NotImplementedError


@dataclass(eq=False)
class TrainStream(Stream):
    """Endless training batches of this share, from the last position given to ``begin_at``.

    ``step_samples`` (G) is a multiple of ``lanes.ranks``; with aspect-ratio buckets ``lanes.ranks`` divides the world,
    so that a batch has one bucket.
    """

    lanes: Lanes = field(default_factory=Lanes)

    def __post_init__(self) -> None:
        self.step_samples = self.batch_size * self.share.world
        self.take = self.step_samples // self.lanes.ranks
        assert self.take * self.lanes.ranks == self.step_samples, "the lanes of a row give equally many samples"
        self.start = Position()

    def begin_at(self, position: Position) -> None:
        """Lanes that the position lacks begin their first pass. Data workers that run already do not notice."""
        self.start = Position(position.step, {**position.lanes})

    def batches(self, share: Share) -> Iterator[Batch]:
        start = self.start
        mine = self.lanes.read_by(share, start.step, self.step_samples)
        readers = {lane: self.reader(lane, start) for lane in sorted(mine)}
        for number in count():
            row = self.lanes.row(start.step + number)
            if number % share.workers == share.worker:
                yield self.make(readers, row, start.step + number)
            for lane in mine.intersection(row):
                readers[lane].drop(self.take)

    def reader(self, lane: int, start: Position) -> Lookahead:
        place = start.lanes.get(lane, self.order.begin())
        return Lookahead(LaneOrder(self.order, Lane(lane, self.lanes.number), self.take).endless(place))

    def make(self, readers: dict[int, Lookahead], row: Sequence[int], step: int) -> Batch:
        """Sample p of a step is number p div ranks of the step's samples from lane p mod ranks of the row."""
        numbers = range(self.share.rank, self.step_samples, self.share.world)
        filled = [self.fill(readers[row[p % self.lanes.ranks]], p // self.lanes.ranks) for p in numbers]
        after = {lane: readers[lane][self.take - 1].after for lane in row if lane in readers}
        rejects = [reject for _, rejects in filled for reject in rejects]
        return self.preparation.batch([sample for sample, _ in filled], rejects, Position(step + 1, after))

    def fill(self, ahead: Lookahead, place: int) -> tuple[Any, list[Rejected]]:
        """The sample for a slot, and the slot's own rejects (not those of its replacements)."""
        slot = ahead[place]
        address = self.order.address(slot)
        counted, tried = [*slot.record.rejects], dict[tuple[str, str, int], list[Rejected]]()
        unread = {source.name for source in self.order.sources}
        begun: dict[str, int] = {}
        for i in count(place):
            candidate = ahead[i]
            # in that many passes a lane reads twice as many shards as a source has
            if candidate.epoch - begun.setdefault(candidate.source, candidate.epoch) >= 2 * self.lanes.number:
                unread.discard(candidate.source)
            if not unread:
                raise no_good_samples(chain(*tried.values()), self.order.sources)
            try:
                return self.preparation.sample(candidate.record, address, slot.target), counted
            except Rejected as reject:
                record = candidate.record
                tried[candidate.source, record.shard, record.index] = [*record.rejects, reject.at()]
                if candidate is slot:
                    counted.append(reject.at())
        raise AssertionError("the order is endless")


@dataclass(eq=False)
class ValStream(Stream):
    """All samples in file order; this share makes every (world · workers)-th batch."""

    def batches(self, share: Share) -> Iterator[Batch]:
        """Rejects of a batch without any good sample are counted with this share's next batch."""
        rejects, delivered = list[Rejected](), False
        for number, slots in enumerate(chunks(self.order.in_file_order(), self.batch_size)):
            if number % share.readers != share.reader:
                continue
            samples = self.good(slots, rejects)
            self.log_reasons(rejects)
            if samples:
                yield self.preparation.batch(samples, rejects, None)
                rejects, delivered = [], True
        if rejects and not delivered:
            self.check_any()

    def good(self, slots: Iterable[Slot], rejects: list[Rejected]) -> list[Any]:
        """The usable ones; adds the others to ``rejects``."""
        samples = []
        for slot in slots:
            rejects += slot.record.rejects
            try:
                samples.append(self.preparation.sample(slot.record, self.order.address(slot), None))
            except Rejected as reject:
                rejects.append(reject.at())
        return samples

    def log_reasons(self, rejects: Iterable[Rejected]) -> None:
        """Each reason once: validation is repeated, and nothing else counts its rejects."""
        for reject in rejects:
            if reject.reason not in self.order.logged:
                self.order.logged.add(reject.reason)
                log.warning("data.val: rejected, %s: %s", reject.reason, in_detail([reject.example]))

    def check_any(self) -> None:
        """Nothing is good in this share; raises ``NoGoodSamples`` if nothing is good in the others either."""
        rejects: list[Rejected] = []
        if not any(self.good([slot], rejects) for slot in self.order.in_file_order()):
            raise no_good_samples(rejects, self.order.sources)
