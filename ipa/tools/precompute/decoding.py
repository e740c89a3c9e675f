"""Tasks → decoded pictures, in data workers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ipa.data.addresses import Address
from ipa.data.images.masks import stack_masks
from ipa.data.images.preparation import ImagePreparation, Sample
from ipa.data.records import Record
from ipa.data.rejects import Rejected

Target = tuple[int, int] | None  # width and height of an aspect-ratio bucket; None is the square


@dataclass
class Task:
    """Records of one bucket to decode together. The last task of a shard has none, but all that reading rejected."""

    records: list[Record] = field(default_factory=list)
    addresses: list[Address] = field(default_factory=list)
    target: Target = None
    ends_window: bool = False
    ends_shard: bool = False
    rejects: list[Rejected] = field(default_factory=list)


@dataclass
class Decoded:
    """The result of a task: the rows of the tensors belong to ``good``; ``broken`` could not be decoded."""

    task: Task
    good: list[Record] = field(default_factory=list)
    broken: list[Record] = field(default_factory=list)
    image_B3HW: Tensor | None = None
    reference_B3HW: Tensor | None = None
    size_B6: Tensor | None = None
    loss_mask_B1HW: Tensor | None = None

    def pin_memory(self) -> Decoded:
        pinned: dict[str, Any] = {name: x.pin_memory() for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **pinned)


class Decoding(Dataset[Decoded]):
    """Indexed by tasks. The records come back without their pictures."""

    def __init__(self, preparation: ImagePreparation) -> None:
        self.preparation = preparation

    def __getitem__(self, task: Task) -> Decoded:
        samples: list[Sample] = []
        decoded = Decoded(replace(task, records=[], addresses=[]))
        for record, address in zip(task.records, task.addresses, strict=True):
            light = replace(record, picture=b"", references=(), measured=record.size, rejects=[])
            light.loss_mask, light.reference_masks = None, ()
            try:
                samples.append(self.preparation.sample(record, address, task.target))
                decoded.good.append(light)
            except Rejected as reject:
                decoded.broken.append(replace(light, broken=reject.at()))
        if samples:
            decoded.image_B3HW = torch.stack([sample.image_3HW for sample in samples])
            decoded.reference_B3HW = torch.stack([sample.reference_3HW for sample in samples])
            decoded.size_B6 = torch.stack([sample.size_6 for sample in samples])
            decoded.loss_mask_B1HW = stack_masks([sample.loss_mask_1HW for sample in samples])
        return decoded
