"""Randomness with an address: a generator is a pure function of what is drawn, never of when or where it is drawn.

The seed is the BLAKE2b digest of the address written as JSON. torch's CPU generator keeps 32 bits of a seed, so two
addresses in about 65,000 share their numbers by chance; that is harmless here, and no reason to expect uniqueness.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Item = TypeVar("Item")


def digest(*parts: str | int) -> int:
    """64 bits that depend on every part, their order and their borders."""
    written = json.dumps(parts, ensure_ascii=True, separators=(",", ":")).encode()
    return int.from_bytes(hashlib.blake2b(written, digest_size=8).digest(), "big")


def generator_at(*parts: str | int) -> torch.Generator:
    """A fresh CPU generator for this address."""
    return torch.Generator().manual_seed(digest(*parts))


def uniform_at(*parts: str | int) -> float:
    """A number in [0, 1), exact in float32."""
    return torch.rand((), generator=generator_at(*parts)).item()


def permuted(items: Sequence[Item], *parts: str | int) -> list[Item]:
    """``items`` in the order that belongs to this address."""
    return [items[i] for i in torch.randperm(len(items), generator=generator_at(*parts)).tolist()]


@dataclass(frozen=True)
class Address:
    """Where a sample stands: pass ``epoch`` over ``source``, sample ``index`` (from 0) of the file named ``shard``.

    ``shard`` is the name without its folders, so that moving the data changes nothing; files of one name in several
    folders should be told apart by ``source``.
    """

    seed: int
    epoch: int
    source: str
    shard: str
    index: int

    def generator(self, draw: str) -> torch.Generator:
        """The generator for one kind of draw; a new kind leaves the others as they are."""
        return generator_at("sample", self.seed, self.epoch, self.source, self.shard, self.index, draw)
