"""Records of pictures → samples → batches: decode, crop, augment, draw, stack."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ipa.data.addresses import Address, DropRates, draw
from ipa.data.images.augment import Augmentation
from ipa.data.images.transforms import Background, Size, cover, cut_corner, fit_named, fit_reference, open_picture
from ipa.data.records import Record
from ipa.data.rejects import Rejected
from ipa.errors import UserError
from ipa.types import Batch, Position

CROPS = ("center", "random")


@dataclass
class Sample:
    """A decoded record. ``address`` is where its draws are made: its own, unless it replaces a broken sample.

    ``size_6`` describes the target's crop, as in ``TextCondition``.
    """

    image_3HW: Tensor
    reference_3HW: Tensor
    size_6: Tensor
    text: str
    record: Record
    address: Address


@dataclass(frozen=True)
class ImagePreparation:
    """Image preprocessing: edge of target and reference, size of the latents (C, H, W; all 0 if unknown yet), drops.

    Pictures of more than ``max_pixels`` are rejected before they are decoded; ``headroom`` is that of ``open_picture``.
    ``crop`` is the target's. The reference is cropped independently, in the way that its encoder expects
    (``reference_fit``); ``augment`` changes only the reference.
    """

    image_size_px: int = 0
    reference_size_px: int = 0
    latent_shape: tuple[int, int, int] = (0, 0, 0)
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
        fit_named(self.reference_fit)

    @property
    def sample_bytes(self) -> int:
        """Pixels of target and reference, and two draws of noise."""
        return 3 * (self.image_size_px**2 + self.reference_size_px**2) + 8 * math.prod(self.latent_shape)

    def sample(self, record: Record, address: Address, target: Size | None = None) -> Sample:
        """Raises ``Rejected`` if a picture cannot be used; a second try on the same record costs nothing."""
        if record.broken:
            raise record.broken
        try:
            return self.decode(record, address, target or (self.image_size_px, self.image_size_px))
        except Rejected as reject:
            record.broken, record.picture, record.references = reject.copy(), b"", ()
            raise

    def decode(self, record: Record, address: Address, target: Size) -> Sample:
        """Target and reference; if a record has references of its own, one is chosen at random."""
        colour, need = self.background.colour(address), self.augment.need(self.reference_size_px)
        needs = [target] if record.references else [target, need]
        picture = open_picture(record.picture, colour, self.max_pixels, needs, self.headroom).shrunk(target)
        shown = picture
        if record.references:
            chosen = record.references[int(address.uniform("reference") * len(record.references))]
            shown = open_picture(chosen, colour, self.max_pixels, [need], self.headroom)
        place = self.place(address)
        reference_3HW = fit_reference(
            self.augment.crop(shown, need, address), self.reference_size_px, self.reference_fit
        )
        return Sample(
            cover(picture, target, place),
            self.augment.change(reference_3HW, address),
            size_condition(picture.size, target, place),
            address.choose("caption", record.captions),
            record,
            address,
        )

    def place(self, address: Address) -> tuple[float, float]:
        """Position of the target's crop, as fractions of the margin, across and down."""
        if self.crop == "random":
            return address.uniform("crop x"), address.uniform("crop y")
        return 0.5, 0.5

    def batch(self, samples: Sequence[Sample], rejects: Counter[str], position: Position | None = None) -> Batch:
        """Stack samples of one size, and make their draws."""
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


def size_condition(size: Size, target: Size, place: tuple[float, float]) -> Tensor:
    """Original height and width, top and left of the crop, height and width of the crop (px)."""
    left, top = cut_corner(size, target, place)
    return torch.tensor([size[1], size[0], top, left, target[1], target[0]])
