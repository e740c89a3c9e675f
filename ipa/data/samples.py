"""Records → samples → batches: decode, cut, draw, stack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ipa.data.addresses import Address
from ipa.data.augment import Augmentation
from ipa.data.draws import DropRates, draw, uniform
from ipa.data.records import Record
from ipa.data.rejects import Rejected
from ipa.data.transforms import FITS, Background, cover, cut_corner, open_picture
from ipa.errors import UserError
from ipa.types import Batch, Position

CROPS = ("center", "random")


@dataclass
class Sample:
    """A decoded record. ``address`` is where its draws are made: its own, unless it stands in for a broken one.

    ``size_6`` tells how the target was cut, as in ``TextCondition``.
    """

    image_3HW: Tensor
    reference_3HW: Tensor
    size_6: Tensor
    text: str
    record: Record
    address: Address


class Prepares(Protocol):
    """What turns records into samples of its own kind, and these into batches.

    ``target`` is width and height of an aspect-ratio bucket, None without.
    """

    def sample(self, record: Record, address: Address, target: tuple[int, int] | None) -> Any: ...

    def batch(self, samples: Sequence[Any], rejects: Counter[str], position: Position | None) -> Batch: ...


@dataclass(frozen=True)
class Preparation:
    """What becomes of a record: edge of target and reference, size of the latents (C, H, W), drops, background.

    Pictures of more than ``max_pixels`` are rejected before they are decoded; ``headroom`` is that of ``open_picture``.
    ``crop`` says where a target is cut from its picture; the reference is cut by itself, as the encoder is used to it
    (``reference_fit``), and ``augment`` changes it and it alone.
    """

    image_size_px: int
    reference_size_px: int
    latent_shape: tuple[int, int, int]
    drops: DropRates = field(default_factory=DropRates)
    background: Background = field(default_factory=Background)
    max_pixels: int = 100_000_000
    headroom: float = 1
    crop: str = "center"
    reference_fit: str = "crop"
    augment: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UserError(f"data.crop={self.crop}: one of {', '.join(CROPS)}")
        if self.reference_fit not in FITS:
            raise UserError(f"data.reference_fit={self.reference_fit}: one of {', '.join(FITS)}")

    def sample(self, record: Record, address: Address, target: tuple[int, int] | None = None) -> Sample:
        """Raises ``Rejected`` if a picture cannot be used; a second try on the same record costs nothing."""
        if record.broken:
            raise record.broken
        try:
            return self.decode(record, address, target or (self.image_size_px, self.image_size_px))
        except Rejected as reject:
            # a new one, since this one's traceback holds the picture
            record.broken, record.picture, record.references = Rejected(reject.reason, reject.detail), b"", ()
            raise

    def decode(self, record: Record, address: Address, target: tuple[int, int]) -> Sample:
        """Target and reference; a record with references of its own is prompted with one of them."""
        colour, need = self.background.colour(address), self.augment.need(self.reference_size_px)
        needs = [target] if record.references else [target, need]
        picture = open_picture(record.picture, colour, self.max_pixels, needs, self.headroom).shrunk(target)
        shown = picture
        if record.references:
            chosen = record.references[int(uniform(address, "reference") * len(record.references))]
            shown = open_picture(chosen, colour, self.max_pixels, [need], self.headroom)
        place = self.place(address)
        return Sample(
            cover(picture, target, place),
            self.augment.reference(shown, self.reference_size_px, self.reference_fit, address),
            size_condition(picture.size, target, place),
            record.caption(uniform(address, "caption")),
            record,
            address,
        )

    def place(self, address: Address) -> tuple[float, float]:
        """Where the target lies in the room that its picture leaves, as fractions across and down."""
        if self.crop == "random":
            return uniform(address, "crop x"), uniform(address, "crop y")
        return 0.5, 0.5

    def batch(self, samples: Sequence[Sample], rejects: Counter[str], position: Position | None = None) -> Batch:
        """Samples of one size, stacked, with their draws."""
        image_B3HW = torch.stack([sample.image_3HW for sample in samples])
        return Batch(
            image_B3HW=image_B3HW,
            reference_B3HW=torch.stack([sample.reference_3HW for sample in samples]),
            text=[sample.text for sample in samples],
            draws=draw([sample.address for sample in samples], self.latents_of(image_B3HW), self.drops),
            size_B6=torch.stack([sample.size_6 for sample in samples]),
            keys=[sample.record.key for sample in samples],
            shards=[sample.record.shard for sample in samples],
            rejects=dict(rejects),
            position=position,
        )

    def latents_of(self, image_B3HW: Tensor) -> tuple[int, int, int]:
        """C, H, W of the latents: those of the square, in proportion."""
        channels, height, width = self.latent_shape
        rows, columns = image_B3HW.shape[-2:]
        return channels, height * rows // self.image_size_px, width * columns // self.image_size_px


def size_condition(size: tuple[int, int], target: tuple[int, int], place: tuple[float, float]) -> Tensor:
    """Height and width before, top and left of the cut, height and width now (px); sizes are width and height."""
    left, top = cut_corner(size, target, place)
    return torch.tensor([size[1], size[0], top, left, target[1], target[0]])


def reasons(rejects: Sequence[Rejected]) -> Counter[str]:
    return Counter(reject.reason for reject in rejects)
