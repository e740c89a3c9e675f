"""Lanes: the independent parts of the training order, so that no reader opens another's shards.

A pass over a source deals its shards, in the pass's own order, to ``ranks · workers`` lanes. Step s of a training takes
its samples from the ``ranks`` lanes of row s mod ``workers``, sample p of the step from lane p mod ``ranks`` of them:

    lane(s, p) = (s mod workers) · ranks + p mod ranks

With as many ranks and data workers as lanes were made for, each reader has one lane to itself. Any other number shares
the same lanes out differently: what is seen stays the same, and some lanes are then read by several.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.utils.data import get_worker_info

from ipa.data.addresses import Item

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
    def readers(self) -> int:
        return self.world * self.workers

    @property
    def reader(self) -> int:
        """Number of this reader among all."""
        return self.worker * self.world + self.rank

    @property
    def first(self) -> bool:
        return self.reader == 0


@dataclass(frozen=True)
class Lane:
    """Lane ``number`` of so many."""

    number: int = 0
    of: int = 1

    def deal(self, shards: Sequence[Item]) -> Sequence[Item]:
        return shards[self.number :: self.of]


@dataclass(frozen=True)
class Lanes:
    """The grid of lanes: as many as this number of ranks, with this number of data workers each, can read apart."""

    ranks: int = 1
    workers: int = 1

    @classmethod
    def fitting(cls, share: Share, shards: int) -> Lanes:
        """One for every reader, as far as each gets a shard; told when readers must share."""
        apart = cls(share.world, share.workers)
        fewer = [apart, cls(share.world, 1), cls(1, share.workers), cls()]
        lanes = next(lanes for lanes in fewer if lanes.number <= shards or lanes == cls())
        if lanes != apart and share.rank == 0:
            log.warning(
                "%d shards are too few for %d ranks × %d data workers to read apart: each shard is read by %d of them",
                *(shards, share.world, share.workers, share.readers // lanes.number),
            )
        return lanes

    @property
    def number(self) -> int:
        return self.ranks * self.workers

    def lane(self, number: int) -> Lane:
        return Lane(number, self.number)

    def row(self, step: int) -> list[int]:
        """The lanes that a step takes its samples from."""
        first = step % self.workers * self.ranks
        return list(range(first, first + self.ranks))

    def read_by(self, share: Share, step: int, step_samples: int) -> set[int]:
        """The lanes that this share needs for its steps, the first of all being ``step``."""
        places = {place % self.ranks for place in range(share.rank, step_samples, share.world)}
        steps = range(step + share.worker, step + share.worker + share.workers * self.workers, share.workers)
        return {self.row(step)[place] for step in steps for place in places}

    def is_told_by(self, share: Share, lane: int, step: int) -> bool:
        """Whether this share is the first of those that read a lane, the one that speaks of its broken shards."""
        row, place = divmod(lane, self.ranks)
        return share.rank == place % share.world and share.worker == (row - step) % self.workers % share.workers
