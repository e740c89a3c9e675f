"""Records of pictures → samples → batches: decode, crop, augment, draw, stack."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ipa.data.addresses import Address, DropRates, draw
from ipa.data.images.augment import Augmentation
from ipa.data.images.masks import cover_mask, masked, open_mask
from ipa.data.images.opening import Size
from ipa.data.images.references import References
from ipa.data.images.transforms import (
    PAD_COLOUR,
    Background,
    Opened,
    cover,
    cut_corner,
    fit_named,
    fit_reference,
    open_picture,
)
from ipa.data.pairs.partners import BrokenPartner, Partners
from ipa.data.records import Mask, Record, make_batch
from ipa.data.rejects import Rejected
from ipa.errors import UserError
from ipa.types import Batch, MoreReferences, Position

CROPS = ("center", "random")


@dataclass
class Sample:
    """A decoded record. ``address`` is where its draws are made: its own, unless it replaces a broken sample.

    ``size_6`` describes the target's crop, as in ``TextCondition``; the loss mask has a value for each latent cell.
    """

    image_3HW: Tensor
    reference_3HW: Tensor
    size_6: Tensor
    text: str
    record: Record
    address: Address
    more_references: Sequence[Tensor] = ()
    loss_mask_1HW: Tensor | None = None


@dataclass(frozen=True)
class ImagePreparation:
    """Image preprocessing: edge of target and reference, size of the latents (C, H, W; all 0 if unknown yet), drops.

    Pictures of more than ``max_pixels`` are rejected before they are decoded; ``headroom`` is that of ``open_picture``.
    ``crop`` is the target's. The reference is cropped independently, in the way that its encoder expects
    (``reference_fit``); ``augment`` and ``reference_background`` (None is the target's) change only the reference.
    ``references`` says how many there are, ``partners`` lend them.
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
    references: References = field(default_factory=References)
    reference_background: Background | None = None
    partners: Partners | None = None

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UserError(f"data.crop={self.crop}: one of {', '.join(CROPS)}")
        fit_named(self.reference_fit)

    @property
    def sample_bytes(self) -> int:
        """Pixels of target and references, and two draws of noise."""
        references = self.references.most * self.reference_size_px**2
        return 3 * (self.image_size_px**2 + references) + 8 * math.prod(self.latent_shape)

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
            record.loss_mask, record.reference_masks = None, ()
            raise record.broken from None

    def decode(self, record: Record, lender: Record, address: Address, target: Size) -> Sample:
        """The record's target and the lender's references, mostly the same record; some of several are chosen."""
        colour, need = self.background.colour(address), self.augment.need(self.reference_size_px)
        shared = lender is record and not record.references and self.reference_background is None
        needs = [target, need] if shared else [target]
        picture = open_picture(record.picture, colour, self.max_pixels, needs, self.headroom).shrunk(target)
        try:
            shown = list(self.shown(lender, picture if shared else None, colour, need, address))
        except Rejected as reject:
            raise (reject if lender is record else BrokenPartner.of(reject, lender)) from None
        # position of the target's crop, as fractions of the margin, across and down
        is_random = self.crop == "random"
        place = (address.uniform("crop x"), address.uniform("crop y")) if is_random else (0.5, 0.5)
        first, *more = (self.reference(each, need, numbered(address, n)) for n, each in enumerate(shown))
        return Sample(
            cover(picture, target, place),
            first,
            size_condition(picture.size, target, place),
            address.choose("caption", record.captions),
            record,
            address,
            more,
            self.loss_mask(record.loss_mask, picture.size, target, place),
        )

    def shown(
        self, lender: Record, picture: Opened | None, colour: str, need: Size, address: Address
    ) -> Iterator[Opened]:
        """The opened pictures that the references are made from; ``picture`` is the lender's, if it is open."""
        own = self.reference_background
        behind = None if own is None else own.colour(address, "reference background")
        offered = lender.references or (lender.picture,)
        masks: Sequence[Mask | None] = lender.reference_masks or [None] * len(offered)
        if picture is not None:
            yield self.masked(picture, masks[0], behind)
            return
        for chosen, mask in self.references.choose(list(zip(offered, masks, strict=True)), address):
            opened = open_picture(chosen, behind or colour, self.max_pixels, [need], self.headroom)
            yield self.masked(opened, mask, behind)

    def masked(self, picture: Opened, mask: Mask | None, colour: str | None) -> Opened:
        if mask is None:
            return picture
        return masked(picture, open_mask(mask, picture.size, self.max_pixels), colour or PAD_COLOUR)

    def reference(self, shown: Opened, need: Size, address: Address) -> Tensor:
        cropped = self.augment.crop(shown, need, address)
        return self.augment.change(fit_reference(cropped, self.reference_size_px, self.reference_fit), address)

    def loss_mask(self, mask: Mask | None, size: Size, target: Size, place: tuple[float, float]) -> Tensor | None:
        if mask is None:
            return None
        return cover_mask(open_mask(mask, size, self.max_pixels), target, place, self.cells_of(target))

    def batch(self, samples: Sequence[Sample], rejects: Sequence[Rejected], position: Position | None = None) -> Batch:
        """Stack samples of one size, and make their draws."""
        tensors = {
            "image_B3HW": torch.stack([sample.image_3HW for sample in samples]),
            "reference_B3HW": torch.stack([sample.reference_3HW for sample in samples]),
            "size_B6": torch.stack([sample.size_6 for sample in samples]),
        }
        width, height = self.cells_of(tensors["image_B3HW"].shape[:1:-1])
        draws = draw([sample.address for sample in samples], (self.latent_shape[0], height, width), self.drops)
        more = self.stack_more([sample.more_references for sample in samples])
        masks = [sample.loss_mask_1HW for sample in samples]
        return make_batch(samples, draws, rejects, position, masks=masks, **tensors, more=more)

    def stack_more(self, references: Sequence[Sequence[Tensor]]) -> MoreReferences | None:
        """The references of each sample in a batch beyond its first, uint8 pixels_3HW; None if no sample has any."""
        rows = [(row, slot, each) for row, of_row in enumerate(references) for slot, each in enumerate(of_row)]
        if not rows:
            return None
        row_R, slot_R, pixels = zip(*rows, strict=True)
        return MoreReferences(torch.stack(pixels), torch.tensor(row_R), torch.tensor(slot_R), self.references.most - 1)

    def cells_of(self, target: Sequence[int]) -> Size:
        """Width and height of the latents of an image: those of the square, in proportion."""
        _, height, width = self.latent_shape
        return width * target[0] // self.image_size_px, height * target[1] // self.image_size_px


def numbered(address: Address, reference: int) -> Address:
    """Where a reference's own draws are made: the first's at the sample's address."""
    return replace(address, source=f"{address.source}, reference {reference}") if reference else address


def size_condition(size: Size, target: Size, place: tuple[float, float]) -> Tensor:
    """Original height and width, top and left of the crop, height and width of the crop (px)."""
    left, top = cut_corner(size, target, place)
    return torch.tensor([size[1], size[0], top, left, target[1], target[0]])
