"""Base classes of the metrics of generated images.

    metric.update(generated, references, captions)              # per batch
    metric.compute()                                            # {"clip_i": 0.83}
    metric.per_item()                                           # {"clip_i": value_B}, for intervals and tables

Networks run on the device that the metric is moved to; rows are kept on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ipa.errors import UserError
from ipa.types import to_uint8

# pixels in [-1, 1]: B3HW, or 3HW each of its own size
Images = Tensor | Sequence[Tensor]


class ImageMetric(Metric):
    """Collects rows, one per pair of image and reference, in ``states`` of these names.

    ``higher`` maps the names of the reported values to whether higher is better.
    """

    full_state_update = False

    network: Any  # an ImageNetwork, None for metrics without one

    def __init__(self, states: Sequence[str], higher: dict[str, bool], network: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.higher = higher
        # outside the module tree: the network is shared, and not saved or reset with the metric
        object.__setattr__(self, "network", network)
        for name in states:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the network, which other metrics may share; rows stay on the CPU."""
        if self.network is not None:
            self.network.to(*args, **kwargs)
        return self

    def update(self, generated: Images, references: Images, captions: list[list[str]] | None = None) -> None:
        """Add images, their image prompts, and each prompt's captions; pixels in [-1, 1], on any device."""
        parts = {"generated": generated, "references": references, "captions": captions}
        lengths = {name: len(part) for name, part in parts.items() if part is not None}
        if len(set(lengths.values())) > 1:
            raise UserError(f"expected equally many of all, got {lengths}")
        for name, values in self.measure(generated, references, captions).items():
            getattr(self, name).append(values.detach().cpu())

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        """State → its rows for these images; a state can be omitted, but then in every update."""
        raise NotImplementedError

    def rows(self) -> dict[str, Tensor]:
        """All rows, in the order of the updates."""
        states = {name: getattr(self, name) for name in self._defaults}
        found = {name: dim_zero_cat(state) for name, state in states.items() if len(state) > 0}
        lengths = {name: len(rows) for name, rows in found.items()}
        if not found:
            raise UserError(f"{type(self).__name__} has no images")
        if len(set(lengths.values())) > 1:
            raise UserError(f"give captions with every update or with none: {lengths}")
        return found


class ItemMetric(ImageMetric):
    """A metric with a value for each image; reports the mean."""

    def values(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reported values of each image."""
        return rows

    def per_item(self) -> dict[str, Tensor]:
        """Name → value_B."""
        return self.values(self.rows())

    def compute(self) -> dict[str, Tensor]:
        """Name → mean over the images."""
        return {name: values.double().mean().float() for name, values in self.values(self.rows()).items()}


class ImageSimilarity(ItemMetric):
    """Cosine of the network's unit-length features of image and prompt, reported as ``name``."""

    def __init__(self, network: Any, name: str, higher: bool = True, **kwargs: Any) -> None:
        super().__init__([name], {name: higher}, network, **kwargs)
        self.name = name

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        generated_BE, references_BE = (self.network.embed_images(images) for images in (generated, references))
        return {self.name: (generated_BE * references_BE).sum(1)}


class ImageDistance(ImageSimilarity):
    """One minus the cosine, as DreamSim is reported; lower is better."""

    def __init__(self, network: Any, name: str, **kwargs: Any) -> None:
        super().__init__(network, name, higher=False, **kwargs)

    def values(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: 1 - rows[self.name]}


def first_of_each(keys_B: Tensor) -> Tensor:
    """Position of the first row with each key, in the order of the keys."""
    return torch.from_numpy(np.unique(keys_B.numpy(), return_index=True)[1])


def on_each_size(function: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    """Apply ``function`` to pixels_B3HW: to a tensor at once, to a list image by image."""
    if isinstance(images, Tensor):
        return function(images)
    return torch.cat([function(image_3HW[None]) for image_3HW in images])


def fit_square(pixels_B3HW: Tensor, size_px: int, crop_px: int | None = None) -> Tensor:
    """Resize the shortest side to ``size_px`` (bicubic, antialias), then crop the centre to ``crop_px``, if given."""
    crop_px = crop_px or size_px
    height, width = pixels_B3HW.shape[-2:]
    factor = size_px / min(height, width)
    sides = (max(size_px, round(height * factor)), max(size_px, round(width * factor)))
    if sides != (height, width):
        pixels_B3HW = F.interpolate(pixels_B3HW, sides, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (sides[0] - crop_px) // 2, (sides[1] - crop_px) // 2
    return pixels_B3HW if sides == (crop_px, crop_px) else pixels_B3HW[..., top : top + crop_px, left : left + crop_px]


def image_keys(images: Images) -> Tensor:
    """Hash of each image's pixels in 256 levels: key_B (int64)."""

    def key(image_3HW: Tensor) -> int:
        levels = to_uint8(image_3HW).cpu().contiguous()
        salt = str(tuple(levels.shape[1:])).encode()[:16]
        return int.from_bytes(hashlib.blake2b(levels.numpy().tobytes(), digest_size=8, salt=salt).digest(), signed=True)

    return torch.tensor([key(image_3HW) for image_3HW in images])
