"""Shards as a Lightning datamodule: endless training batches that resume exactly, and a finite validation set.

    data = ShardDataModule("demo/data/train", "demo/data/heldout", batch_size=32)
    data.fit_to(image_size_px=64, reference_size_px=64, latent_shape=(4, 16, 16))

The place in the training order is that of the last batch that training told by ``consumed``, not of those fetched
ahead. It is what ``state_dict`` saves, and where the training loader starts each time that it is iterated.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from ipa.data.draws import NO_DROPS, DropRates
from ipa.data.order import Order
from ipa.data.samples import Preparation
from ipa.data.shards import expand_shards
from ipa.data.stream import Share, TrainStream, ValStream
from ipa.data.transforms import Background
from ipa.types import Batch, Position

log = logging.getLogger(__name__)

Shards = str | Sequence[str]


class TrainLoader(DataLoader[Batch]):
    """A DataLoader whose every iteration starts where ``position()`` says at that moment."""

    def __init__(self, stream: TrainStream, position: Callable[[], Position], **options: Any) -> None:
        super().__init__(stream, **options)
        self.stream = stream
        self.position = position

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.stream.begin_at(self.position())
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty, since the datamodule keeps the place; without it Lightning would warn that nobody does."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class ShardDataModule(LightningDataModule):
    """WebDataset shards in img2dataset's layout → ``Batch``; raises ``NoShards`` at once if they are not there.

    ``batch_size`` is per device. The sizes in pixels and the latents' (C, H, W) come from the loaded models, by
    ``fit_to``. Validation makes the same draws each time and drops nothing. ``rejects`` counts what ``consumed``
    batches skipped, by reason (this rank's part).
    """

    def __init__(
        self,
        train: Shards,
        val: Shards | None = None,
        *,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        val_limit: int | None = None,
        num_workers: int = 2,
        seed: int = 0,
        image_size_px: int | None = None,
        reference_size_px: int | None = None,
        latent_shape: Sequence[int] | None = None,
        drops: DropRates | None = None,
        background: Background | None = None,
        caption_key: str = "txt",
        window: int = 2048,
        max_pixels: int = 100_000_000,
        source: str = "train",
    ) -> None:
        super().__init__()
        self.train_order = Order(expand_shards(train), seed, source, caption_key, window)
        self.val_order = None if val is None else Order(expand_shards(val), seed, "val", caption_key, window)
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.val_limit = val_limit
        self.num_workers = num_workers
        self.image_size_px = image_size_px
        self.reference_size_px = reference_size_px
        self.latent_shape = latent_shape
        self.drops = drops or DropRates()
        self.background = background or Background()
        self.max_pixels = max_pixels
        self.position = Position()
        self.rejects: Counter[str] = Counter()

    def fit_to(self, *, image_size_px: int, reference_size_px: int, latent_shape: Sequence[int]) -> None:
        """Take the sizes that the loaded models ask for; before the first loader is made."""
        self.image_size_px = image_size_px
        self.reference_size_px = reference_size_px
        self.latent_shape = latent_shape

    def train_dataloader(self) -> TrainLoader:
        stream = TrainStream(self.train_order, self.preparation(self.drops), self.batch_size, self.share())
        return TrainLoader(stream, lambda: self.position, **self.loader_options())

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """No loader at all without validation shards."""
        if self.val_order is None:
            return []
        preparation = self.preparation(NO_DROPS)
        stream = ValStream(self.val_order, preparation, self.val_batch_size, self.val_limit, self.share())
        return DataLoader(stream, **self.loader_options())

    def preparation(self, drops: DropRates) -> Preparation:
        if self.image_size_px is None or self.reference_size_px is None or self.latent_shape is None:
            raise ValueError("the datamodule does not know its sizes yet: call fit_to(...) before making a loader")
        channels, height, width = self.latent_shape
        return Preparation(
            self.image_size_px,
            self.reference_size_px,
            (channels, height, width),
            drops,
            self.background,
            self.max_pixels,
        )

    def share(self) -> Share:
        """This process's part, as the trainer says; the whole without one."""
        return Share(self.trainer.global_rank, self.trainer.world_size) if self.trainer else Share()

    def loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": None,  # the streams make the batches
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def consumed(self, batch: Batch) -> None:
        """Training calls this after each training batch, before a checkpoint is written."""
        assert batch.position is not None, "not a training batch"
        self.position = batch.position
        self.rejects.update(batch.rejects)

    def state_dict(self) -> dict[str, Any]:
        return {**self.position._asdict(), "order": self.train_order.fingerprint(), "rejects": dict(self.rejects)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the saved place.

        Positions count the samples of all ranks, so another number of workers changes nothing, and another number of
        ranks or batch size only groups the remaining samples differently. With another seed, window or list of shards
        the saved place means nothing: training begins the next pass.
        """
        self.position = Position(state["epoch"], state["offset"])
        self.rejects = Counter(state["rejects"])
        if state["order"] != self.train_order.fingerprint():
            self.position = Position(state["epoch"] + 1, 0)
            log.warning(
                "the checkpoint was made with other shards, seed, caption key or window: going on with a new pass (%s)",
                self.position,
            )
