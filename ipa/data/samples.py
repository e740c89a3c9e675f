"""Records → samples → batches: decode, cut, draw, stack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ipa.data.addresses import Address
from ipa.data.draws import DropRates, draw
from ipa.data.records import Record
from ipa.data.rejects import Rejected
from ipa.data.transforms import Background, cut_corner, open_picture, square, to_tensor
from ipa.types import Batch, Position


@dataclass
class Sample:
    """A decoded record. ``address`` is where its draws are made: its own, unless it stands in for a broken one.

    ``size_6`` tells how the target was cut, as in ``TextCondition``.
    """

    image_3HW: Tensor
    reference_3HW: Tensor
    size_6: Tensor
    record: Record
    address: Address


@dataclass(frozen=True)
class Preparation:
    """What becomes of a record: edge of target and reference, size of the latents (C, H, W), drops, background.

    Pictures of more than ``max_pixels`` are rejected before they are decoded.
    """

    image_size_px: int
    reference_size_px: int
    latent_shape: tuple[int, int, int]
    drops: DropRates
    background: Background
    max_pixels: int = 100_000_000

    def sample(self, record: Record, address: Address) -> Sample:
        """Raises ``Rejected`` if the picture cannot be used; a second try on the same record costs nothing."""
        if record.broken:
            raise record.broken
        try:
            picture = open_picture(record.picture, self.background.colour(address), self.max_pixels)
        except Rejected as reject:
            record.broken, record.picture = reject, b""
            raise
        image, reference = square(picture, self.image_size_px), square(picture, self.reference_size_px)
        size_6 = size_condition(picture.size, self.image_size_px)
        return Sample(to_tensor(image), to_tensor(reference), size_6, record, address)

    def batch(self, samples: Sequence[Sample], rejects: Counter[str], position: Position | None = None) -> Batch:
        return Batch(
            image_B3HW=torch.stack([sample.image_3HW for sample in samples]),
            reference_B3HW=torch.stack([sample.reference_3HW for sample in samples]),
            text=[sample.record.caption for sample in samples],
            draws=draw([sample.address for sample in samples], self.latent_shape, self.drops),
            size_B6=torch.stack([sample.size_6 for sample in samples]),
            keys=[sample.record.key for sample in samples],
            shards=[sample.record.shard for sample in samples],
            rejects=dict(rejects),
            position=position,
        )


def size_condition(size: tuple[int, int], size_px: int) -> Tensor:
    """Height and width before, top and left of the cut, height and width now (px), of a picture cut by ``square``."""
    (width, height), (left, top) = size, cut_corner(size, size_px)
    return torch.tensor([height, width, top, left, size_px, size_px])


def reasons(rejects: Sequence[Rejected]) -> Counter[str]:
    return Counter(reject.reason for reject in rejects)
