"""What all scores of generated images share: one ``update``, and the same result on any number of processes.

    metric.update(generated, references, captions, index_B)     # per batch, in every process
    metric.compute()                                            # {"clip_i": 0.83}
    metric.per_item()                                           # {"clip_i": value_B}, for intervals and tables

An image's value does not depend on the other images, except for retrieval. A distribution metric compares two sets and
has no values of single images. Networks run on the device that the metric is moved to; rows are kept on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ipa.distributed import gather
from ipa.errors import UserError
from ipa.metrics.pixels import Images


class ImageMetric(Metric):
    """Collects rows, one per pair of image and reference, in ``states`` of these names.

    ``higher`` maps the names of the reported values to whether higher is better.
    """

    full_state_update = False

    network: Any  # an ImageNetwork, None for metrics without one
    index_B: list[Tensor]

    def __init__(self, states: Sequence[str], higher: dict[str, bool], network: Any = None, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": gather_rows, **kwargs})
        self.higher = higher
        # outside the module tree: the network is shared, and not saved or reset with the metric
        object.__setattr__(self, "network", network)
        for name in (*states, "index_B"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the network, which other metrics may share; rows stay on the CPU."""
        if self.network is not None:
            self.network.to(*args, **kwargs)
        return self

    def update(
        self,
        generated: Images,
        references: Images,
        captions: list[list[str]] | None = None,
        index_B: Tensor | None = None,
    ) -> None:
        """Add images, their image prompts, and each prompt's captions; pixels in [-1, 1], on any device.

        ``index_B`` are the images' numbers in the benchmark. Values are reported in this order, and a repeated number
        (a sampler padding the last batch) counts once. Without it the order is that of the updates, by process.
        """
        parts = {"generated": generated, "references": references, "captions": captions, "index_B": index_B}
        lengths = {name: len(part) for name, part in parts.items() if part is not None}
        if len(set(lengths.values())) > 1:
            raise UserError(f"expected equally many of all, got {lengths}")
        rows = self.measure(generated, references, captions)
        for name, values in {**rows, **({} if index_B is None else {"index_B": index_B})}.items():
            getattr(self, name).append(values.detach().cpu())

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        """State → its rows for these images; a state can be omitted, but then in every update."""
        raise NotImplementedError

    def rows(self) -> dict[str, Tensor]:
        """All rows in the order of the numbers, each number once."""
        states = {name: getattr(self, name) for name in self._defaults}
        found = {name: dim_zero_cat(state) for name, state in states.items() if len(state) > 0}
        found = {name: rows for name, rows in found.items() if len(rows) > 0}
        lengths = {name: len(rows) for name, rows in found.items()}
        if not found:
            raise UserError(f"{type(self).__name__} has no images")
        if len(set(lengths.values())) > 1:
            raise UserError(f"give captions and index_B with every update or with none: {lengths}")
        if "index_B" not in found:
            return found
        order = first_of_each(found.pop("index_B"))
        return {name: rows[order] for name, rows in found.items()}


class ItemMetric(ImageMetric):
    """A metric with a value for each image; reports the mean."""

    def values(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reported values of each image."""
        return rows

    def per_item(self) -> dict[str, Tensor]:
        """Name → value_B, over all processes; all of them must call it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return self.values(self.rows())

    def compute(self) -> dict[str, Tensor]:
        """Name → mean over the images."""
        return {name: values.double().mean().float() for name, values in self.values(self.rows()).items()}


def first_of_each(keys_B: Tensor) -> Tensor:
    """Position of the first row with each key, in the order of the keys."""
    return torch.from_numpy(np.unique(keys_B.numpy(), return_index=True)[1])


def gather_rows(rows: Tensor, group: Any = None) -> list[Tensor]:
    """Every rank's rows, of any number; torchmetrics' own gathering hangs or fails if a rank has none."""
    return [part for part in gather(rows, group) if len(part) > 0] or [rows]
