"""Records of pictures → samples → batches: decode, crop, augment, draw, stack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ipa.data.addresses import Address, DropRates, draw
from ipa.data.images.augment import Augmentation
from ipa.data.images.opening import Size
from ipa.data.images.transforms import Background, Opened, cover, cut_corner, fit_named, fit_reference, open_picture
from ipa.data.pairs.partners import BrokenPartner, Partners
from ipa.data.records import Record, make_batch
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
    (``reference_fit``); ``augment`` and ``reference_background`` (None is the target's) change only the reference.
    ``partners`` lend it.
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
    reference_background: Background | None = None
    partners: Partners | None = None

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
        lender = record if self.partners is None else self.partners.lend(record, address)
        try:
            return self.decode(record, lender, address, target or (self.image_size_px, self.image_size_px))
        except BrokenPartner:
            raise
        except Rejected as reject:
            record.broken, record.picture, record.references = reject.at(record.key, record.shard), b"", ()
            raise record.broken from None

    def decode(self, record: Record, lender: Record, address: Address, target: Size) -> Sample:
        """The record's target and the lender's reference, mostly the same record."""
        colour, need = self.background.colour(address), self.augment.need(self.reference_size_px)
        shared = lender is record and not record.references and self.reference_background is None
        needs = [target, need] if shared else [target]
        picture = open_picture(record.picture, colour, self.max_pixels, needs, self.headroom).shrunk(target)
        try:
            shown = picture if shared else self.open_reference(lender, address, need, colour)
        except Rejected as reject:
            raise (reject if lender is record else BrokenPartner.of(reject, lender)) from None
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

    def open_reference(self, lender: Record, address: Address, need: Size, colour: str) -> Opened:
        """If a record has references of its own, one is chosen at random. ``colour`` is behind the target."""
        chosen = lender.picture
        if lender.references:
            chosen = lender.references[int(address.uniform("reference") * len(lender.references))]
        if self.reference_background is not None:
            colour = self.reference_background.colour(address, "reference background")
        return open_picture(chosen, colour, self.max_pixels, [need], self.headroom)

    def place(self, address: Address) -> tuple[float, float]:
        """Position of the target's crop, as fractions of the margin, across and down."""
        if self.crop == "random":
            return address.uniform("crop x"), address.uniform("crop y")
        return 0.5, 0.5

    def batch(self, samples: Sequence[Sample], rejects: Sequence[Rejected], position: Position | None = None) -> Batch:
        """Stack samples of one size, and make their draws."""
        tensors = {
            "image_B3HW": torch.stack([sample.image_3HW for sample in samples]),
            "reference_B3HW": torch.stack([sample.reference_3HW for sample in samples]),
            "size_B6": torch.stack([sample.size_6 for sample in samples]),
        }
        draws = draw([sample.address for sample in samples], self.latents_of(tensors["image_B3HW"]), self.drops)
        return make_batch(samples, draws, rejects, position, **tensors)

    def latents_of(self, image_B3HW: Tensor) -> tuple[int, int, int]:
        """C, H, W of the latents: those of the square, in proportion."""
        channels, height, width = self.latent_shape
        rows, columns = image_B3HW.shape[-2:]
        return channels, height * rows // self.image_size_px, width * columns // self.image_size_px


def size_condition(size: Size, target: Size, place: tuple[float, float]) -> Tensor:
    """Original height and width, top and left of the crop, height and width of the crop (px)."""
    left, top = cut_corner(size, target, place)
    return torch.tensor([size[1], size[0], top, left, target[1], target[0]])
