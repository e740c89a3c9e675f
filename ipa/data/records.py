"""Types that the data folders share: a ``Source`` yields ``Record``s, a ``Preparation`` makes batches of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ipa.data.addresses import Address
from ipa.data.images.opening import Size, picture_size
from ipa.data.rejects import Rejected, Tally
from ipa.types import Batch, Draws, Position


class Mask(NamedTuple):
    """A picture that is white inside; with ``is_alpha`` it is the opacity of this one."""

    data: bytes
    is_alpha: bool


@dataclass
class Record:
    """A sample as stored in its shard; ``index`` counts all samples of the shard, good and bad, from 0.

    ``captions`` are given with their probabilities, which sum to 1. ``references`` are other pictures of the same
    subject; without any the picture is its own reference. ``reference_masks`` has a mask for each, or one for the
    picture, where the source has masks. ``rejects`` are unusable neighbours, so that each is counted once. ``broken``
    is why the picture could not be decoded, once that was tried. ``source`` is set by the order; ``span`` is where the
    sample begins and ends in its shard, in bytes. ``values`` are the metadata's entries that its layout keeps.
    """

    key: str
    shard: str
    index: int
    picture: bytes
    captions: tuple[tuple[str, float], ...]
    references: tuple[bytes, ...] = ()
    measured: Size | None = None
    rejects: list[Rejected] = field(default_factory=list)
    broken: Rejected | None = None
    source: str = ""
    span: tuple[int, int] = (0, 0)
    loss_mask: Mask | None = None
    reference_masks: tuple[Mask, ...] = ()
    values: tuple[Any, ...] = ()

    @property
    def size(self) -> Size | None:
        """Width and height (px) of the upright picture; None if its header cannot be read."""
        if self.measured is None and self.picture:
            with suppress(Rejected):
                self.measured = picture_size(self.picture)
        return self.measured


@dataclass(frozen=True)
class Source(ABC):
    """Shards that are read in the same way. ``weight`` is its share of the samples, relative to the other sources."""

    name: str
    shards: list[str]
    weight: float

    @abstractmethod
    def read(self, shard: str) -> Iterator[Record | Rejected]:
        """The samples of one of the shards, in file order."""

    @abstractmethod
    def layout_fingerprint(self) -> str:
        """Covers what decides which samples of a shard are used, and what they hold."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Covers everything that decides which records there are and what they hold; not the folders: data may move."""


def make_batch(
    samples: Sequence[Any],
    draws: Draws,
    rejects: Sequence[Rejected],
    position: Position | None,
    *,
    masks: Sequence[Tensor | None],
    **tensors: Any,
) -> Batch:
    """What the batches of all preparations have, and their ``tensors``; ``masks`` are the loss masks of the samples."""
    tally = Tally.of(rejects)
    return Batch(
        text=[sample.text for sample in samples],
        draws=draws,
        keys=[sample.record.key for sample in samples],
        shards=[sample.record.shard for sample in samples],
        rejects=tally.counts,
        reject_examples=tally.examples,
        position=position,
        loss_mask_B1HW=stack_masks(masks),
        **tensors,
    )


def stack_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """mask_B1HW; a sample without a mask is inside everywhere. None if no sample has one."""
    known = next((mask for mask in masks if mask is not None), None)
    if known is None:
        return None
    inside = torch.full_like(known, 255)
    return torch.stack([inside if mask is None else mask for mask in masks])


class Preparation(Protocol):
    """Records → samples (raises ``Rejected``) → batches. ``target`` is an aspect-ratio bucket, None without buckets."""

    @property
    def sample_bytes(self) -> int:
        """About the size of a sample in a batch."""

    def sample(self, record: Record, address: Address, target: Size | None) -> Any: ...

    def batch(self, samples: Sequence[Any], rejects: Sequence[Rejected], position: Position | None) -> Batch: ...
