"""Shards as a Lightning datamodule: endless training batches that resume exactly, and a finite validation set.

    data = ShardDataModule("demo/data/train", "demo/data/heldout", batch_size=32)
    data.fit_to(image_size_px=64, reference_size_px=64, latent_shape=(4, 16, 16))

The position in the training order is that of the last batch that training gave to ``consumed``, not of prefetched ones.
``state_dict`` saves it, and the training loader starts there each time that it is iterated.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from ipa.data import workers
from ipa.data.addresses import NO_DROPS
from ipa.data.images.augment import Augmentation
from ipa.data.images.buckets import Buckets
from ipa.data.images.preparation import ImagePreparation
from ipa.data.images.references import References
from ipa.data.order.lanes import Lanes, Share
from ipa.data.order.sequence import Order
from ipa.data.order.streams import TrainStream, ValStream
from ipa.data.pairs.options import Pairs
from ipa.data.pairs.partners import open_partners
from ipa.data.records import Preparation
from ipa.data.rejects import Tally, in_detail
from ipa.data.shards.names import TRUSTED
from ipa.data.shards.source import ShardSource
from ipa.distributed import gather
from ipa.errors import UserError
from ipa.types import Batch, LanePlace, Position, SourcePlace, TextInputs

log = logging.getLogger(__name__)

Shards = str | Sequence[str]

LAYOUT = ("captions", "image", "reference", "reference_mask")  # options for the training's shards and for val
READERS_CHANGED = "%d ranks × %d workers read the data before, now %d × %d: samples and order stay the same%s"


class TrainLoader(DataLoader[Batch]):
    """A DataLoader whose every iteration starts at the current ``position()``."""

    def __init__(self, stream: TrainStream, position: Callable[[], Position], **options: Any) -> None:
        super().__init__(stream, **options)
        self.stream = stream
        self.position = position

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.stream.begin_at(self.position())
        self._iterator = None  # persistent workers would keep the stream that they were started with
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty, since the datamodule keeps the position; Lightning warns about a loader without this method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class StreamDataModule(LightningDataModule):
    """Orders of samples → loaders, and the position that training has reached.

    ``captions``, ``image``, ``reference``, ``reference_mask`` and ``schemes`` belong to the validation shards ``val``.
    ``batch_size`` is per device. ``lanes`` are the ``ranks`` and ``workers`` (data workers of each) that the training
    order is made for; null values are those of the run that begins. ``pairs`` are options of ``Pairs``, ``images``
    those of ``ImagePreparation``; ``fit_to`` sets its sizes. Batches may be needed for ``grace_s`` after a signal.
    ``texts`` are states of texts that come with the data; None: the base encodes texts.
    ``rejected`` is what ``consumed`` batches skipped (on this rank).
    """

    texts: dict[str, TextInputs] | None = None

    def __init__(
        self,
        train_order: Order,
        val: Shards | None,
        *,
        captions: Any = "txt",
        image: Any = None,
        reference: Any = None,
        reference_mask: Any = None,
        schemes: Sequence[str] = TRUSTED,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 2,
        lanes: Mapping[str, int | None] | None = None,
        pairs: Mapping[str, Any] | None = None,
        **images: Any,
    ) -> None:
        super().__init__()
        self.partners = open_partners(Pairs.of(pairs), train_order.sources)
        self.train_order, self.val_order = train_order, None
        if val is not None:
            layout = {"captions": captions, "image": image, "reference": reference, "reference_mask": reference_mask}
            self.val_order = Order([ShardSource.of("val", shards=val, schemes=schemes, **layout)], train_order.seed)
        self.images = ImagePreparation(**{name: value for name, value in images.items() if value is not None})
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.num_workers, self.grace_s = num_workers, 25.0
        self.asked_lanes = {name: number for name, number in (lanes or {}).items() if number is not None}
        self.lanes: Lanes | None = None
        self.readers: tuple[int, int] | None = None
        self.position = Position()
        self.rejected = Tally()

    def fit_to(self, *, image_size_px: int, reference_size_px: int, latent_shape: Sequence[int]) -> None:
        """Take the sizes that the loaded models need; before the first loader is made."""
        channels, height, width = latent_shape
        sizes: dict[str, Any] = {"image_size_px": image_size_px, "reference_size_px": reference_size_px}
        self.images = replace(self.images, **sizes, latent_shape=(channels, height, width))

    def check_model(self, model: Any) -> None:
        """Raise UserError for frozen parts that do not fit these data; pictures fit all."""

    def train_preparation(self) -> Preparation:
        if not self.images.image_size_px:
            raise UserError("the datamodule does not know its sizes yet: call fit_to(...) before making a loader")
        return replace(self.images, partners=self.partners)

    def val_preparation(self) -> Preparation:
        """The same draws each time, nothing dropped, nothing random, one reference each: the sample's own."""
        own: dict[str, Any] = {"references": References(), "reference_background": None}
        return replace(self.images, drops=NO_DROPS, crop="center", augment=Augmentation(), **own)

    def train_dataloader(self) -> TrainLoader:
        lanes = self.settle_lanes()
        preparation = self.train_preparation()
        processes = self.trainer.num_devices if self.trainer else 1  # of this machine
        workers.check_shared_memory(self.batch_size * preparation.sample_bytes, self.num_workers * processes)
        stream = TrainStream(self.train_order, preparation, self.batch_size, self.share(), lanes)
        return TrainLoader(stream, lambda: self.position, **self.loader_options())

    def val_dataloader(self, share: Share | None = None) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """``share`` is by default this process's part among the ranks. No loader without validation shards."""
        if self.val_order is None:
            return []
        stream = ValStream(self.val_order, self.val_preparation(), self.val_batch_size, share or self.share())
        return DataLoader(stream, **self.loader_options())

    def share(self) -> Share:
        """This process's part of the batches; the whole without a trainer."""
        return Share(self.trainer.global_rank, self.trainer.world_size) if self.trainer else Share()

    def loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": None,  # the streams make the batches
            "num_workers": self.num_workers,
            "prefetch_factor": workers.PREFETCH if self.num_workers > 0 else None,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": partial(workers.begin, grace_s=self.grace_s) if self.num_workers > 0 else None,
            "pin_memory": torch.cuda.is_available(),
        }

    def consumed(self, batch: Batch) -> None:
        """Training calls this after each training batch, before a checkpoint is written."""
        assert batch.position is not None, "not a training batch"
        self.position.step = batch.position.step
        self.position.lanes.update(batch.position.lanes)
        for reason in self.rejected.add(batch.rejects, batch.reject_examples):
            log.warning("data.train: rejected, %s: %s", reason, in_detail(self.rejected.examples[reason]))

    def settle_lanes(self) -> Lanes:
        """Choose lanes for a run that begins; for one that resumes, check that its lanes can still be read."""
        share = Share(self.share().rank, self.share().world, 0, max(1, self.num_workers))
        now = (share.world, share.workers)
        if self.lanes is None:
            self.lanes = self.lanes_to_begin_with(share)
        elif why := self.misfit(self.lanes):
            before, self.lanes = self.lanes, self.lanes_to_begin_with(share)
            self.begin_new_pass(f"its order was made for {before.ranks} ranks, but {why}")
        elif self.readers is not None and self.readers != now:
            shared = "" if now == (self.lanes.ranks, self.lanes.workers) else "; several workers now read some shards"
            log.warning(READERS_CHANGED, *self.readers, *now, shared)
        self.readers = now
        return self.lanes

    def lanes_to_begin_with(self, share: Share) -> Lanes:
        """As asked; by default those that this run's ranks and workers read best. Raises UserError."""
        shards = min(len(source.shards) for source in self.train_order.sources)
        if not self.asked_lanes:
            return Lanes.fitting(share, shards)
        lanes = Lanes(**{"ranks": share.world, "workers": share.workers, **self.asked_lanes})
        why = self.misfit(lanes)
        if lanes.number > shards:
            why = f"a source has only {shards} shards, and each lane needs one"
        if why:
            raise UserError(f"data.lanes={self.asked_lanes}: {why}; null lets the run choose")
        return lanes

    def misfit(self, lanes: Lanes) -> str | None:
        """Why a step of this run cannot take its samples from these lanes."""
        world = self.share().world
        if self.batch_size * world % lanes.ranks:
            return f"{self.batch_size} samples × {world} ranks are not a multiple of {lanes.ranks}"
        if self.train_order.buckets and world % lanes.ranks:
            return f"with aspect-ratio buckets {world} ranks cannot share the lanes of {lanes.ranks}"
        return None

    def begin_new_pass(self, why: str) -> None:
        """Skip the rest of the open passes, in which the saved position has no meaning any more."""
        assert self.lanes is not None
        places = [place for lane in self.position.lanes.values() for place in lane.sources]
        epoch = 1 + max((place.epoch for place in places), default=0)
        self.position.lanes = dict.fromkeys(range(self.lanes.number), self.train_order.begin(epoch))
        log.warning("the data start a new pass (%d): %s", epoch, why)

    def all_rejects(self) -> Counter[str]:
        """What all ranks rejected, by reason; all of them must call it."""
        return sum(gather(self.rejected.counts), Counter[str]())

    def state_dict(self) -> dict[str, Any]:
        """The position of every lane, gathered from all ranks; all of them must call it."""
        lanes = furthest(gather(self.position.lanes))
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
        """With aspect-ratio buckets the order within a window also depends on the samples per step."""
        step_samples = self.batch_size * self.share().world if self.train_order.buckets else 0
        pairs = f"-{self.partners.fingerprint()}" if self.partners else ""
        return f"{self.train_order.fingerprint()}-{step_samples}{pairs}"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at the saved position, with the lanes that the run began with.

        The samples do not depend on the number of ranks and workers, as long as they can share the lanes. With another
        seed, window or list of shards the saved position has no meaning, and training starts a new pass.
        """
        self.lanes = state["grid"] and Lanes(*state["grid"])
        self.readers = state["readers"] and tuple(state["readers"])
        self.position = Position(state["step"])
        for lane, (choices, places) in state["lanes"].items():
            self.position.lanes[lane] = LanePlace(choices, tuple(SourcePlace(*place) for place in places))
        self.rejected.counts = Counter(state["rejects"] if self.share().rank == 0 else {})
        if state["step_samples"] != self.step_samples():
            before, now = state["step_samples"], self.step_samples()
            log.warning("a step had %d samples, now it has %d; global_batch_size=%d keeps it", before, now, before)
        if state["order"] != self.fingerprint():
            self.lanes = self.lanes or Lanes()
            self.begin_new_pass("the checkpoint was made with other shards, seed, captions, filters or window")


class ShardDataModule(StreamDataModule):
    """WebDataset shards in img2dataset's layout → ``Batch``; raises ``NoShards`` at once if they do not exist.

    Either ``train`` names shards, read as ``captions``, ``image``, ``filters``, ``reference`` and the masks say, or
    ``sources`` names entries of ``known``, each with values for ``ShardSource.of``. ``options`` are those of
    ``StreamDataModule``.
    """

    def __init__(
        self,
        train: Shards | None = None,
        val: Shards | None = None,
        *,
        sources: Sequence[str] | None = None,
        known: Mapping[str, Mapping[str, Any]] | None = None,
        filters: Mapping[str, Any] | None = None,
        loss_mask: Any = None,
        buckets: Any = None,
        window: int = 2048,
        seed: int = 0,
        schemes: Sequence[str] = TRUSTED,
        **options: Any,
    ) -> None:
        layout = {name: options[name] for name in LAYOUT if name in options}
        strip = Pairs.of(options.get("pairs")).strip
        shards = choose_sources(train, sources, known or {}, filters=filters, loss_mask=loss_mask, **layout)
        read = [ShardSource.of(name, **values, strip=strip, schemes=schemes) for name, values in shards.items()]
        super().__init__(Order(read, seed, window), val, schemes=schemes, **options)
        self.bucket_sizes = buckets
        check_members(read, self.images.references.most)

    def fit_to(self, *, image_size_px: int, **sizes: Any) -> None:
        super().fit_to(image_size_px=image_size_px, **sizes)
        if self.bucket_sizes is not None:
            self.train_order.buckets = Buckets.of(self.bucket_sizes, image_size_px)


def check_members(sources: Sequence[ShardSource], most: int) -> None:
    """Raise UserError if no sample can have as many references; log where it may have more."""
    for source in sources:
        members = source.layout.references
        if most > max(1, len(members)):
            raise UserError(
                f"data.references.chances: up to {most} references, but {source.name} has only "
                f"{', '.join(members) or 'the picture itself'}. Name {most} members in data.reference, or give fewer "
                "chances"
            )
        if 1 < most < len(members):
            log.info("%s: up to %d of the references %s, others in each pass", source.name, most, ", ".join(members))


def choose_sources(
    train: Shards | None, names: Sequence[str] | None, known: Mapping[str, Any], **layout: Any
) -> dict[str, dict[str, Any]]:
    """Name → values of ``ShardSource.of``; raises UserError unless one of ``train`` and known ``names`` is given."""
    if (train is None) == (names is None):
        both = "data.train and data.sources are both given" if names is not None else "no data are given"
        raise UserError(f"{both}: give data.train=SHARDS, or data.sources=[NAME, …] of {', '.join(known) or 'none'}")
    if names is None:
        return {"train": {"shards": train, **layout}}
    check_names(names, known)
    return {name: {**known[name], "option": f"data.known.{name}"} for name in names}


def check_names(names: Sequence[str], known: Mapping[str, Any]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise UserError(
            f"data.sources={list(names)}: give one or several of {', '.join(known) or 'none'}, each once; add another "
            "with +source@data.known.NAME=plain"
        )
    if own := [name for name in names if "schemes" in known[name]]:
        raise UserError(f"data.known.{own[0]}.schemes: data.schemes is for all sources")
    if without := [name for name in names if not known[name].get("shards")]:
        raise UserError(f"give the shards: {' '.join(f'data.known.{name}.shards=…' for name in without)}")


def furthest(known_to_ranks: Iterable[Mapping[int, LanePlace]]) -> dict[int, LanePlace]:
    """After a resume each rank has the positions of all lanes, but those of the others' lanes are old."""
    lanes: dict[int, LanePlace] = {}
    for known in known_to_ranks:
        lanes |= {lane: max(place, lanes.get(lane, place), key=reached) for lane, place in known.items()}
    return lanes


def reached(place: LanePlace) -> tuple[list[int], int]:
    """Sort key for positions of one lane: a new pass of the sources starts counting the choices again."""
    return [source.epoch for source in place.sources], place.choices
