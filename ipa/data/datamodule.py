"""Shards as a Lightning datamodule: endless training batches that resume exactly, and a finite validation set.

    data = ShardDataModule("demo/data/train", "demo/data/heldout", batch_size=32)
    data.fit_to(image_size_px=64, reference_size_px=64, latent_shape=(4, 16, 16))

The place in the training order is that of the last batch that training told by ``consumed``, not of those fetched
ahead. It is what ``state_dict`` saves, and where the training loader starts each time that it is iterated.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from ipa.data import workers
from ipa.data.augment import Augmentation
from ipa.data.buckets import Buckets
from ipa.data.draws import NO_DROPS, DropRates
from ipa.data.lanes import Lanes, Share
from ipa.data.order import Order
from ipa.data.samples import Preparation, Prepares
from ipa.data.shards import TRUSTED
from ipa.data.sources import Source
from ipa.data.stream import AuditStream, TrainStream, ValStream
from ipa.data.transforms import Background
from ipa.distributed import gather
from ipa.errors import UserError
from ipa.types import Batch, LanePlace, Position, SourcePlace

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


class StreamDataModule(LightningDataModule):
    """Orders of samples → loaders, and the place that training has reached.

    ``batch_size`` is per device. ``lanes`` says for how many ``ranks`` and ``workers`` (data workers of each) the
    training order is dealt out; what is null there is taken from the run that begins. For ``grace_s`` after a signal
    batches may still be wanted. ``rejects`` counts what ``consumed`` batches skipped, by reason (this rank's part).
    """

    def __init__(
        self,
        train_order: Order,
        val_order: Order | None,
        *,
        batch_size: int,
        val_batch_size: int | None,
        val_limit: int | None,
        num_workers: int,
        lanes: Mapping[str, int | None] | None,
    ) -> None:
        super().__init__()
        self.train_order, self.val_order = train_order, val_order
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.val_limit = val_limit
        self.num_workers = num_workers
        self.grace_s = 25.0
        self.asked_lanes = dict(lanes or {})
        self.lanes: Lanes | None = None
        self.readers: tuple[int, int] | None = None
        self.position = Position()
        self.rejects: Counter[str] = Counter()

    @abstractmethod
    def train_preparation(self) -> Prepares:
        """What becomes of the training order's records."""

    @abstractmethod
    def val_preparation(self) -> Prepares:
        """What becomes of the validation's: the same draws each time, nothing dropped."""

    def train_dataloader(self) -> TrainLoader:
        self.settle_lanes()
        stream = TrainStream(self.train_order, self.train_preparation(), self.batch_size, self.share(), self.lanes)
        return TrainLoader(stream, lambda: self.position, **self.loader_options())

    def val_dataloader(self, share: Share | None = None) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """This process's ``share``, its part among the ranks if not given; no loader at all without such shards."""
        if self.val_order is None:
            return []
        preparation, share = self.val_preparation(), share or self.share()
        stream = ValStream(self.val_order, preparation, self.val_batch_size, self.val_limit, share)
        return DataLoader(stream, **self.loader_options())

    def audit_dataloader(self) -> DataLoader[Batch]:
        """One pass over the training sources: every good sample once, see ``AuditStream``."""
        stream = AuditStream(self.train_order, self.train_preparation(), self.batch_size, self.share())
        return DataLoader(stream, **self.loader_options())

    def check_model(self, model: Any) -> None:
        """Raise UserError for frozen parts that these data are not for; pictures are for all."""

    def share(self) -> Share:
        """This process's part, as the trainer says; the whole without one."""
        return Share(self.trainer.global_rank, self.trainer.world_size) if self.trainer else Share()

    def loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": None,  # the streams make the batches
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": partial(workers.begin, grace_s=self.grace_s) if self.num_workers > 0 else None,
            "pin_memory": torch.cuda.is_available(),
        }

    def consumed(self, batch: Batch) -> None:
        """Training calls this after each training batch, before a checkpoint is written."""
        assert batch.position is not None, "not a training batch"
        self.position.step = batch.position.step
        self.position.lanes.update(batch.position.lanes)
        self.rejects.update(batch.rejects)

    def settle_lanes(self) -> None:
        """Lanes for a run that begins; for one that goes on, whether those it began with can still be read."""
        world, workers = self.share().world, max(1, self.num_workers)
        if self.lanes is None:
            self.lanes = self.lanes_to_begin_with(Share(self.share().rank, world, 0, workers))
        elif why := self.misfit(self.lanes):
            lanes, self.lanes = self.lanes, self.lanes_to_begin_with(Share(self.share().rank, world, 0, workers))
            self.begin_new_pass(f"its order was dealt out for {lanes.ranks} ranks, but {why}")
        elif self.readers not in (None, (world, workers)):
            self.tell_readers((world, workers))
        self.readers = (world, workers)

    def lanes_to_begin_with(self, share: Share) -> Lanes:
        """As asked, and where nothing is asked as this run's ranks and workers read best; raises UserError."""
        asked = {name: number for name, number in self.asked_lanes.items() if number is not None}
        shards = min(len(source.shards) for source in self.train_order.sources)
        if not asked:
            return Lanes.fitting(share, shards)
        lanes = Lanes(**{"ranks": share.world, "workers": share.workers, **asked})
        why = self.misfit(lanes)
        if lanes.number > shards:
            why = f"a source has {shards} shards only, and each lane needs one"
        if why:
            raise UserError(f"data.lanes={asked}: {why}; null leaves the choice to the run")
        return lanes

    def misfit(self, lanes: Lanes) -> str | None:
        """Why a step of this run cannot take its samples from these lanes."""
        world = self.share().world
        if self.batch_size * world % lanes.ranks:
            return f"{self.batch_size} samples × {world} ranks are no multiple of {lanes.ranks}"
        if self.train_order.buckets and world % lanes.ranks:
            return f"with aspect-ratio buckets {world} ranks cannot share the lanes of {lanes.ranks}"
        return None

    def tell_readers(self, now: tuple[int, int]) -> None:
        assert self.readers is not None and self.lanes is not None
        log.warning(
            "the data were read by %d ranks × %d workers, now by %d × %d: the samples and their order stay the same%s",
            *(*self.readers, *now),
            "" if now == (self.lanes.ranks, self.lanes.workers) else "; some shards are now read by several workers",
        )

    def begin_new_pass(self, why: str) -> None:
        """Leave the rest of the open passes out, since the place in them has lost its meaning; told."""
        assert self.lanes is not None
        places = [place for lane in self.position.lanes.values() for place in lane.sources]
        epoch = 1 + max((place.epoch for place in places), default=0)
        begin = self.train_order.begin(epoch)
        self.position.lanes = dict.fromkeys(range(self.lanes.number), begin)
        log.warning("the data go on with a new pass (%d): %s", epoch, why)

    def all_rejects(self) -> Counter[str]:
        """What all ranks rejected, by reason: to be called by all of them."""
        return sum(gather(self.rejects), Counter[str]())

    def state_dict(self) -> dict[str, Any]:
        """The place of every lane, gathered from all ranks: to be called by all of them.

        After a resume each rank knows the places of the others' lanes, too, but as they were: the furthest counts.
        """
        lanes: dict[int, LanePlace] = {}
        for known in gather(self.position.lanes):
            lanes |= {lane: max(place, lanes.get(lane, place), key=reached) for lane, place in known.items()}
        return {
            "step": self.position.step,
            "lanes": {lane: [place.choices, [list(each) for each in place.sources]] for lane, place in lanes.items()},
            "grid": None if self.lanes is None else [self.lanes.ranks, self.lanes.workers],
            "readers": self.readers and list(self.readers),
            "order": self.fingerprint(),
            "step_samples": self.step_samples(),
            "rejects": dict(self.all_rejects()),
        }

    def step_samples(self) -> int:
        """Of one optimizer step, over all ranks."""
        return self.batch_size * self.share().world * (self.trainer.accumulate_grad_batches if self.trainer else 1)

    def fingerprint(self) -> str:
        """With aspect-ratio buckets a window's arrangement depends on the samples of a step, too."""
        step_samples = self.batch_size * self.share().world if self.train_order.buckets else 0
        return f"{self.train_order.fingerprint()}-{step_samples}"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the saved place, with the lanes that the run began with.

        Another number of ranks or workers changes nothing in what is seen, as long as the lanes can be shared among
        them. With another seed, window or list of shards the saved place means nothing: training begins a new pass.
        """
        self.lanes = state["grid"] and Lanes(*state["grid"])
        self.readers = state["readers"] and tuple(state["readers"])
        self.position = Position(state["step"], {lane: to_place(*place) for lane, place in state["lanes"].items()})
        self.rejects = Counter(state["rejects"] if self.share().rank == 0 else {})
        if state["step_samples"] != self.step_samples():
            before, now = state["step_samples"], self.step_samples()
            log.warning("a step had %d samples, now it has %d; global_batch_size=%d keeps it", before, now, before)
        if state["order"] != self.fingerprint():
            self.lanes = self.lanes or Lanes()
            self.begin_new_pass("the checkpoint was made with other shards, seed, captions, filters or window")


class ShardDataModule(StreamDataModule):
    """WebDataset shards in img2dataset's layout → ``Batch``; raises ``NoShards`` at once if they are not there.

    Either ``train`` names shards, read as ``captions``, ``filters`` and ``reference`` say, or ``sources`` names entries
    of ``known``, each with values for ``Source.of``. The sizes in pixels and the latents' (C, H, W) come from the
    loaded models, by ``fit_to``. Validation makes the same draws each time and drops nothing.
    """

    def __init__(
        self,
        train: Shards | None = None,
        val: Shards | None = None,
        *,
        sources: Sequence[str] | None = None,
        known: Mapping[str, Mapping[str, Any]] | None = None,
        captions: Any = "txt",
        filters: Mapping[str, Any] | None = None,
        reference: Any = None,
        crop: str = "center",
        reference_fit: str = "crop",
        augment: Augmentation | None = None,
        buckets: Any = None,
        drops: DropRates | None = None,
        background: Background | None = None,
        max_pixels: int = 100_000_000,
        headroom: float = 1,
        window: int = 2048,
        seed: int = 0,
        image_size_px: int | None = None,
        reference_size_px: int | None = None,
        latent_shape: Sequence[int] | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        val_limit: int | None = None,
        num_workers: int = 2,
        lanes: Mapping[str, int | None] | None = None,
        schemes: Sequence[str] = TRUSTED,
    ) -> None:
        shards = choose_sources(train, sources, known or {}, captions=captions, filters=filters, reference=reference)
        read = [Source.of(name, **values, schemes=schemes) for name, values in shards.items()]
        train_order = Order(read, seed, window)
        layout = {"captions": captions, "reference": reference, "schemes": schemes}
        held_out = None if val is None else Source.of("val", shards=val, **layout)
        super().__init__(
            train_order,
            None if held_out is None else Order([held_out], seed),
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            val_limit=val_limit,
            num_workers=num_workers,
            lanes=lanes,
        )
        self.crop, self.reference_fit, self.augment = crop, reference_fit, augment or Augmentation()
        self.background, self.max_pixels, self.headroom = background or Background(), max_pixels, headroom
        self.drops, self.bucket_sizes = drops or DropRates(), buckets
        self.image_size_px, self.reference_size_px, self.latent_shape = image_size_px, reference_size_px, latent_shape

    def fit_to(self, *, image_size_px: int, reference_size_px: int, latent_shape: Sequence[int]) -> None:
        """Take the sizes that the loaded models ask for; before the first loader is made."""
        self.image_size_px = image_size_px
        self.reference_size_px = reference_size_px
        self.latent_shape = latent_shape
        if self.bucket_sizes is not None:
            self.train_order.buckets = Buckets.of(self.bucket_sizes, image_size_px)

    def train_preparation(self) -> Preparation:
        return self.preparation(self.drops, self.crop, self.augment)

    def val_preparation(self) -> Preparation:
        return self.preparation(NO_DROPS, "center", Augmentation())

    def preparation(self, drops: DropRates, crop: str, augment: Augmentation) -> Preparation:
        if self.image_size_px is None or self.reference_size_px is None or self.latent_shape is None:
            raise UserError("the datamodule does not know its sizes yet: call fit_to(...) before making a loader")
        channels, height, width = self.latent_shape
        return Preparation(
            self.image_size_px,
            self.reference_size_px,
            (channels, height, width),
            drops,
            self.background,
            self.max_pixels,
            self.headroom,
            crop,
            self.reference_fit,
            augment,
        )


def choose_sources(
    train: Shards | None, names: Sequence[str] | None, known: Mapping[str, Any], **layout: Any
) -> dict[str, dict[str, Any]]:
    """Name → values of ``Source.of`` for what is asked; raises UserError when that is nothing, both, or unknown."""
    if (train is None) == (names is None):
        both = "data.train and data.sources are both given" if names is not None else "no data are given"
        raise UserError(f"{both}: say data.train=SHARDS, or data.sources=[NAME, …] of {', '.join(known) or 'none'}")
    if names is None:
        return {"train": {"shards": train, **layout}}
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise UserError(
            f"data.sources={list(names)}: give one or several of {', '.join(known) or 'none'}, each once; add another "
            "with +source@data.known.NAME=plain"
        )
    if own := [name for name in names if "schemes" in known[name]]:
        raise UserError(f"data.known.{own[0]}.schemes: data.schemes is for all sources")
    without = [name for name in names if not known[name].get("shards")]
    if without:
        raise UserError(f"say where the shards are: {' '.join(f'data.known.{name}.shards=…' for name in without)}")
    return {name: {**known[name], "option": f"data.known.{name}"} for name in names}


def reached(place: LanePlace) -> tuple[list[int], int]:
    """Orders the places of one lane: by the passes of its sources, since a new pass begins the choices anew."""
    return [source.epoch for source in place.sources], place.choices


def to_place(choices: int, sources: Sequence[Sequence[int]]) -> LanePlace:
    return LanePlace(choices, tuple(SourcePlace(*source) for source in sources))
