"""Randomness with an address: every random number is a pure function of what is drawn, not of when or where.

A generator is seeded with the BLAKE2b digest of its address in JSON. torch's CPU generator keeps 32 bits of a seed, so
two addresses in about 65,000 share their numbers by chance. That is harmless here, but addresses are not unique.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ipa.errors import UserError
from ipa.types import Draws

Item = TypeVar("Item")


def digest(*parts: str | int) -> int:
    """64 bits that depend on every part, their order and where each ends."""
    written = json.dumps(parts, ensure_ascii=True, separators=(",", ":")).encode()
    return int.from_bytes(hashlib.blake2b(written, digest_size=8).digest(), "big")


def generator_at(*parts: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(digest(*parts))


def uniform_at(*parts: str | int) -> float:
    return torch.rand((), generator=generator_at(*parts)).item()


def permuted(items: Sequence[Item], *parts: str | int) -> list[Item]:
    return [items[i] for i in torch.randperm(len(items), generator=generator_at(*parts)).tolist()]


@dataclass(frozen=True)
class Address:
    """The address of a sample: pass ``epoch`` over ``source``, sample ``index`` (from 0) of the file ``shard``.

    ``shard`` is the file name without folders, so moving the data changes nothing. Files with the same name in several
    folders should belong to different sources.
    """

    seed: int
    epoch: int
    source: str
    shard: str
    index: int

    def generator(self, draw: str) -> torch.Generator:
        """The generator of one kind of draw; a new kind does not change the others."""
        return generator_at("sample", self.seed, self.epoch, self.source, self.shard, self.index, draw)

    def uniform(self, draw: str) -> float:
        return torch.rand((), generator=self.generator(draw)).item()

    def choose(self, draw: str, chances: Sequence[tuple[Item, float]]) -> Item:
        """One of the items, with these probabilities (which sum to 1)."""
        u = self.uniform(draw)
        for item, chance in chances:
            u -= chance
            if u < 0:
                return item
        return chances[-1][0]  # the sum of the chances is rounded


@dataclass(frozen=True)
class DropRates:
    """Fraction of samples that lose only the text, only the image, or both (Ye et al. 2023, section 4.1: 5 % each)."""

    text: float = 0.05
    image: float = 0.05
    both: float = 0.05

    def __post_init__(self) -> None:
        rates = (self.text, self.image, self.both)
        if not all(isinstance(rate, int | float) for rate in rates) or not (min(rates) >= 0 and sum(rates) <= 1):
            raise UserError(f"drop rates must be at least 0 and sum to at most 1, not {self}")

    def drops(self, u: float) -> tuple[bool, bool]:
        """One joint draw: u in [0, 1) → (drop the text, drop the image)."""
        both = self.text + self.image <= u < self.text + self.image + self.both
        return u < self.text or both, self.text <= u < self.text + self.image or both


NO_DROPS = DropRates(0, 0, 0)


def draw(addresses: Sequence[Address], latent_shape: tuple[int, int, int], rates: DropRates) -> Draws:
    """The random numbers of a training batch. Row b belongs to ``addresses[b]``; ``latent_shape`` is (C, H, W)."""

    def normal(name: str) -> torch.Tensor:
        return torch.stack([torch.randn(latent_shape, generator=address.generator(name)) for address in addresses])

    drops = [rates.drops(address.uniform("drop")) for address in addresses]
    return Draws(
        posterior_noise_BCHW=normal("posterior"),
        noise_BCHW=normal("noise"),
        time_B=torch.tensor([address.uniform("time") for address in addresses]),
        drop_text_B=torch.tensor([text for text, _ in drops]),
        drop_image_B=torch.tensor([image for _, image in drops]),
    )
