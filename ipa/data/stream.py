"""The order → batches, shared among ranks and workers.

Training. Step s takes the slots s·G … s·G + G - 1 of the endless order, G = world · batch size. Rank r makes every
world-th of them from r on, and of a rank's steps worker w makes every workers-th. So one process with batch 2b sees in
a step what two with b see, the number of workers changes nothing, and nobody starves however few the shards are.

A slot whose picture turns out broken is filled with the next good record of the order, which thereby comes twice in
that pass; the draws stay the slot's own. This depends on nothing but the data, so all the above holds in dirty data
too, every rank makes equally many steps, and a resumed run needs to decode nothing of what lies behind it.

Validation. Slots in file order, in batches of fixed borders; bad samples leave a gap. Each good sample comes once, and
ranks may end at different times.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ipa.data.order import Order, Slot, chunks
from ipa.data.rejects import Rejected, no_good_samples
from ipa.data.samples import Preparation, Sample, reasons
from ipa.types import Batch, Position

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Which part of the batches is made here."""

    rank: int = 0
    world: int = 1
    worker: int = 0
    workers: int = 1

    def in_worker(self) -> Share:
        """The share of the data worker that this runs in (of the whole rank, outside of one)."""
        info = get_worker_info()
        return self if info is None else replace(self, worker=info.id, workers=info.num_workers)

    @property
    def first(self) -> bool:
        return self.rank == 0 and self.worker == 0


class Ahead:
    """An endless iterator that can be looked into: ``ahead[i]`` is the i-th item from here, ``drop`` moves on."""

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


class TrainStream(IterableDataset[Batch]):
    """Endless training batches of this share, from the position that ``begin_at`` was last told."""

    def __init__(self, order: Order, preparation: Preparation, batch_size: int, share: Share | None = None) -> None:
        self.order = order
        self.preparation = preparation
        self.batch_size = batch_size
        self.share = share or Share()
        # in shared memory: persistent workers hold a copy of this object and must hear of a new start
        self.start = torch.zeros(2, dtype=torch.int64).share_memory_()

    def begin_at(self, position: Position) -> None:
        self.start.copy_(torch.tensor(position))

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(Position(*self.start.tolist()), self.share.in_worker())

    def batches(self, start: Position, share: Share) -> Iterator[Batch]:
        self.order.loud = share.first
        ahead = Ahead(self.order.endless(start))
        step_samples = self.batch_size * share.world
        for step in count():
            if step % share.workers == share.worker:
                yield self.make(ahead, range(share.rank, step_samples, share.world), step_samples)
            ahead.drop(step_samples)

    def make(self, ahead: Ahead, places: range, step_samples: int) -> Batch:
        filled = [self.fill(ahead, place) for place in places]
        last = ahead[step_samples - 1]
        rejects = sum((rejects for _, rejects in filled), Counter[str]())
        return self.preparation.batch([sample for sample, _ in filled], rejects, Position(last.epoch, last.offset + 1))

    def fill(self, ahead: Ahead, place: int) -> tuple[Sample, Counter[str]]:
        """The sample for a slot, and what is counted with it: the slot's own rejects, not those of its stand-ins."""
        slot = ahead[place]
        address = self.order.address(slot)
        counted, tried = reasons(slot.record.rejects), Counter[str]()
        for i in count(place):
            candidate = ahead[i]
            if (candidate.epoch, candidate.offset) >= (slot.epoch + 1, slot.offset):
                raise no_good_samples(tried, len(self.order.shards))
            try:
                return self.preparation.sample(candidate.record, address), counted
            except Rejected as reject:
                tried += reasons([*candidate.record.rejects, reject])
                if candidate is slot:
                    counted += reasons([reject])
        raise AssertionError("the order is endless")


class ValStream(IterableDataset[Batch]):
    """The first ``limit`` samples, once, in file order; this share makes every (world · workers)-th batch."""

    def __init__(
        self,
        order: Order,
        preparation: Preparation,
        batch_size: int,
        limit: int | None = None,
        share: Share | None = None,
    ) -> None:
        self.order = order
        self.preparation = preparation
        self.batch_size = batch_size
        self.limit = limit
        self.share = share or Share()

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(self.share.in_worker())

    def batches(self, share: Share) -> Iterator[Batch]:
        """Rejects of a batch that is bad altogether are counted with this share's next one."""
        self.order.loud = share.first
        shares, mine = share.world * share.workers, share.worker * share.world + share.rank
        rejects, delivered = Counter[str](), False
        for number, slots in enumerate(chunks(self.slots(), self.batch_size)):
            if number % shares != mine:
                continue
            samples = self.good(slots, rejects)
            if samples:
                yield self.preparation.batch(samples, rejects)
                rejects, delivered = Counter[str](), True
        if rejects:
            log.warning("validation ends with rejected samples: %s", dict(rejects))
        if rejects and not delivered:
            self.insist_on_any()

    def slots(self) -> Iterator[Slot]:
        return islice(self.order.in_file_order(), self.limit)

    def good(self, slots: Iterable[Slot], rejects: Counter[str]) -> list[Sample]:
        """The usable ones; adds the others to ``rejects``."""
        samples = []
        for slot in slots:
            rejects.update(reasons(slot.record.rejects))
            try:
                samples.append(self.preparation.sample(slot.record, self.order.address(slot)))
            except Rejected as reject:
                rejects[reject.reason] += 1
        return samples

    def insist_on_any(self) -> None:
        """Nothing good in this share: that is an error only if there is nothing good in the others' either."""
        rejects = Counter[str]()
        if not any(self.good([slot], rejects) for slot in self.slots()):
            raise no_good_samples(rejects, len(self.order.shards))
