"""What all scores of generated pictures share: one ``update``, and the same answer over one or many processes.

    metric.update(generated, references, captions, index_B)     # as often as there are batches, in every process
    metric.compute()                                            # {"clip_i": 0.83}
    metric.per_item()                                           # {"clip_i": value_B}, for intervals and tables

An item's value does not depend on the other items, but for retrieval, which compares with all of them. A distribution
metric compares two sets and has no values of single pictures.
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
from ipa.metrics.networks import PictureNetwork
from ipa.metrics.pixels import Pictures


class PictureMetric(Metric):
    """Collects rows, one for each pair of picture and reference, in ``states`` of these names; they lie on the CPU.

    ``higher`` has the names of the values that are told, and whether more is better.
    """

    full_state_update = False

    network: PictureNetwork | None
    index_B: list[Tensor]

    def __init__(
        self, states: Sequence[str], higher: dict[str, bool], network: PictureNetwork | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**{"dist_sync_fn": gather_rows, **kwargs})
        self.higher = higher
        # kept out of the module tree: the network is shared and must not be saved or reset with the metric
        object.__setattr__(self, "network", network)
        for name in (*states, "index_B"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the network, for all who share it. The rows stay where they are."""
        if self.network is not None:
            self.network.to(*args, **kwargs)
        return self

    def update(
        self,
        generated: Pictures,
        references: Pictures,
        captions: list[list[str]] | None = None,
        index_B: Tensor | None = None,
    ) -> None:
        """Add pictures, their image prompts, and each prompt's captions; pixels in [-1, 1], sizes as they are.

        ``index_B`` are the pictures' numbers in the benchmark: values are told in this order, and a number that comes
        twice, as where a sampler fills up the last batch, counts once. Without it they are told as they came, process
        by process.
        """
        parts = {"generated": generated, "references": references, "captions": captions, "index_B": index_B}
        lengths = {name: len(part) for name, part in parts.items() if part is not None}
        if len(set(lengths.values())) > 1:
            raise UserError(f"there must be equally many of all: {lengths}")
        rows = self.measure(generated, references, captions)
        for name, values in {**rows, **({} if index_B is None else {"index_B": index_B})}.items():
            getattr(self, name).append(values.detach().cpu())

    def measure(self, generated: Pictures, references: Pictures, captions: list[list[str]] | None) -> dict[str, Tensor]:
        """State → its rows for these pictures; a state may be left out, then in every update."""
        raise NotImplementedError

    def rows(self) -> dict[str, Tensor]:
        """All rows, each picture's once, in the order of the numbers."""
        states = {name: getattr(self, name) for name in self._defaults}
        found = {name: dim_zero_cat(state) for name, state in states.items() if len(state) > 0}
        found = {name: rows for name, rows in found.items() if len(rows) > 0}
        lengths = {name: len(rows) for name, rows in found.items()}
        if not found:
            raise UserError(f"{type(self).__name__} was given no pictures")
        if len(set(lengths.values())) > 1:
            raise UserError(f"captions and index_B must come with every update or with none: {lengths}")
        if "index_B" not in found:
            return found
        order = first_of_each(found.pop("index_B"))
        return {name: rows[order] for name, rows in found.items()}


class ItemMetric(PictureMetric):
    """A metric with a value for each picture, whose mean is told."""

    def values(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is told of each picture."""
        return rows

    def per_item(self) -> dict[str, Tensor]:
        """Name → value_B, over all processes: all of them must call it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return self.values(self.rows())

    def compute(self) -> dict[str, Tensor]:
        """Name → mean over the pictures."""
        return {name: values.double().mean().float() for name, values in self.values(self.rows()).items()}


def first_of_each(keys_B: Tensor) -> Tensor:
    """Where each key comes first, in the order of the keys."""
    return torch.from_numpy(np.unique(keys_B.numpy(), return_index=True)[1])


def gather_rows(rows: Tensor, group: Any = None) -> list[Tensor]:
    """Every rank's rows, however many each has; torchmetrics' own gathering hangs or fails when a rank has none."""
    return [part for part in gather(rows, group) if len(part) > 0] or [rows]
