"""Lanes: independent parts of the training order, so that no reader opens another's shards.

A pass over a source deals its shards, in the order of that pass, to ``ranks · workers`` lanes. Step s takes its samples
from the ``ranks`` lanes of row s mod ``workers``, sample p of the step from lane p mod ``ranks`` of that row:

    lane(s, p) = (s mod workers) · ranks + p mod ranks

With exactly that many ranks and data workers each reader has a lane of its own. With any other number the lanes stay
the same, and so do the samples; only some lanes are read by several readers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch.utils.data import get_worker_info

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Which part of the batches this process or data worker makes."""

    rank: int = 0
    world: int = 1
    worker: int = 0
    workers: int = 1

    def in_worker(self) -> Share:
        """The share of the current data worker; the rank's whole share outside of workers."""
        info = get_worker_info()
        return self if info is None else replace(self, worker=info.id, workers=info.num_workers)

    @property
    def readers(self) -> int:
        return self.world * self.workers

    @property
    def reader(self) -> int:
        return self.worker * self.world + self.rank


class Lane(NamedTuple):
    """Lane ``number`` of ``of`` lanes."""

    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class Lanes:
    """The grid of lanes, made for this number of ranks with this number of data workers each."""

    ranks: int = 1
    workers: int = 1

    @classmethod
    def fitting(cls, share: Share, shards: int) -> Lanes:
        """A lane for every reader if there are enough shards; otherwise readers share lanes, which is logged."""
        separate = cls(share.world, share.workers)
        fewer = [separate, cls(share.world, 1), cls(1, share.workers), cls()]
        lanes = next(lanes for lanes in fewer if lanes.number <= shards or lanes == cls())
        if lanes != separate and share.rank == 0:
            each = share.readers // lanes.number
            log.warning("%d shards for %d workers: %d workers read each shard in full", shards, share.readers, each)
        return lanes

    @property
    def number(self) -> int:
        return self.ranks * self.workers

    def row(self, step: int) -> list[int]:
        first = step % self.workers * self.ranks
        return list(range(first, first + self.ranks))

    def read_by(self, share: Share, step: int, step_samples: int) -> set[int]:
        """The lanes that this share reads for its steps from ``step`` on."""
        places = {place % self.ranks for place in range(share.rank, step_samples, share.world)}
        steps = range(step + share.worker, step + share.worker + share.workers * self.workers, share.workers)
        return {self.row(step)[place] for step in steps for place in places}
