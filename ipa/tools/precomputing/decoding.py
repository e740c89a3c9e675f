"""Tasks → decoded pictures, in data workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ipa.data.addresses import Address
from ipa.data.images.preparation import ImagePreparation, Sample
from ipa.data.records import Record
from ipa.data.rejects import Rejected


@dataclass
class Task:
    """Records of one aspect bucket, and whether they are the last ones of a window, or the shard ends here."""

    records: list[Record] = field(default_factory=list)
    addresses: list[Address] = field(default_factory=list)
    target: tuple[int, int] | None = None
    ends_window: bool = False
    ends_shard: bool = False


@dataclass
class Decoded:
    """What became of a task's records: the rows of the tensors belong to ``good``, ``broken`` could not be decoded."""

    task: Task
    good: list[Record] = field(default_factory=list)
    broken: list[Record] = field(default_factory=list)
    image_B3HW: Tensor | None = None
    reference_B3HW: Tensor | None = None
    size_B6: Tensor | None = None

    def pin_memory(self) -> Decoded:
        pinned: dict[str, Any] = {name: x.pin_memory() for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **pinned)


class Decoding(Dataset[Decoded]):
    """A task is its own index. The records come back without their pictures."""

    def __init__(self, preparation: ImagePreparation) -> None:
        self.preparation = preparation

    def __getitem__(self, task: Task) -> Decoded:
        samples: list[Sample] = []
        decoded = Decoded(replace(task, records=[], addresses=[]))
        for record, address in zip(task.records, task.addresses, strict=True):
            light = replace(record, picture=b"", references=(), measured=record.size, rejects=[])
            try:
                samples.append(self.preparation.sample(record, address, task.target))
                decoded.good.append(light)
            except Rejected as reject:
                decoded.broken.append(replace(light, broken=Rejected(reject.reason)))
        return stacked(decoded, samples) if samples else decoded


def stacked(decoded: Decoded, samples: Sequence[Sample]) -> Decoded:
    return replace(
        decoded,
        image_B3HW=torch.stack([sample.image_3HW for sample in samples]),
        reference_B3HW=torch.stack([sample.reference_3HW for sample in samples]),
        size_B6=torch.stack([sample.size_6 for sample in samples]),
    )
