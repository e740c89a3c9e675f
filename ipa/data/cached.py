"""Training from feature shards as a Lightning datamodule, and what a cache cannot draw anew.

    data = CachedDataModule("/data/laion-sd15", batch_size=64)

Order, resume and draws are those of ``ShardDataModule`` over the shards that the features were made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ipa.data.augment import Augmentation
from ipa.data.buckets import Buckets, FixedBuckets
from ipa.data.cache import CachedPreparation, CacheSource, WrongCache
from ipa.data.datamodule import ShardDataModule, Shards, StreamDataModule
from ipa.data.draws import NO_DROPS, DropRates
from ipa.data.order import Order
from ipa.data.records import Layout
from ipa.data.samples import Preparation
from ipa.data.shards import TRUSTED
from ipa.data.sources import Source
from ipa.data.transforms import Background
from ipa.errors import UserError

# what the caches of one training may have each for itself
OWN = {"source", "choices captions", "choices filters", "choices max_pixels", "choices reference"}


class CachedDataModule(StreamDataModule):
    """Feature shards → ``Batch``; raises ``NoShards`` or ``WrongCache`` at once if they are not there or none.

    Either ``train`` names shards, or ``caches`` has several sources' by their names, each with ``shards`` and
    ``weight``. How pictures are cut and laid out was decided when the cache was made: ``crop``, ``reference_fit``,
    ``buckets`` and ``background`` must say the same, the last two only where they say something. Validation reads
    pictures, as ``ShardDataModule`` does.
    """

    def __init__(
        self,
        train: Shards | None = None,
        val: Shards | None = None,
        *,
        caches: Mapping[str, Mapping[str, Any]] | None = None,
        captions: Any = "txt",
        reference: Any = None,
        crop: str = "center",
        reference_fit: str = "crop",
        augment: Augmentation | None = None,
        buckets: Any = None,
        background: Background | None = None,
        drops: DropRates | None = None,
        max_pixels: int = 100_000_000,
        window: int = 2048,
        seed: int = 0,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        val_limit: int | None = None,
        num_workers: int = 2,
        lanes: Mapping[str, int | None] | None = None,
        schemes: Sequence[str] = TRUSTED,
    ) -> None:
        refuse_random(crop, augment, background)
        sources = open_caches(train, caches or {}, schemes)
        self.header = sources[0].header
        layout = {"captions": captions, "reference": reference, "schemes": schemes}
        held_out = None if val is None else Source.of("val", shards=val, **layout)
        super().__init__(
            Order(sources, seed, window),
            None if held_out is None else Order([held_out], seed),
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            val_limit=val_limit,
            num_workers=num_workers,
            lanes=lanes,
        )
        self.drops, self.reference_fit = drops or DropRates(), reference_fit
        self.background, self.max_pixels = background or Background(), max_pixels
        self.bucket_sizes = buckets
        asked = {"crop": crop, "reference_fit": reference_fit}
        self.insist("choices", asked if background is None else asked | {"background": only_colour(background)})
        self.image_size_px, self.reference_size_px = 0, 0
        self.latent_shape: tuple[int, int, int] = (0, 0, 0)

    def fit_to(self, *, image_size_px: int, reference_size_px: int, latent_shape: Sequence[int]) -> None:
        """Check the sizes of the loaded models; raises ``WrongCache`` for others than the cache was made with."""
        channels, height, width = latent_shape
        self.image_size_px, self.reference_size_px = image_size_px, reference_size_px
        self.latent_shape = (channels, height, width)
        sizes = {"image_size_px": image_size_px, "reference_size_px": reference_size_px}
        self.insist("sizes", sizes | {"latent_shape": list(latent_shape)})
        if self.bucket_sizes is not None:
            self.insist("choices", {"buckets": bucket_list(Buckets.of(self.bucket_sizes, image_size_px))})
        if (buckets := self.header.choices.get("buckets")) is not None:
            self.train_order.buckets = FixedBuckets(tuple((width, height) for width, height in buckets))

    def check_model(self, model: Any) -> None:
        """Refuse to train with other frozen parts than the cache was made with; raises ``WrongCache``."""
        kept, uses = self.header.sizes.get("kept", []), model.head.uses
        needed = {"pooled": {"pooled", "reference"}, "patches": {"reference"}}[uses]
        if not needed.intersection(kept):
            raise WrongCache(
                f"{self.where()} keeps {' and '.join(kept)} of each reference, but the head reads its {uses} features: "
                f"make a cache with the same tokens=, or with keep=[{', '.join(sorted(needed))}]"
            )
        found = model.fingerprints()
        if uses == "patches" or "pooled" not in kept:
            found.pop("encoder")  # its features are not in use
        self.insist("fingerprints", found)

    def insist(self, part: str, asked: Mapping[str, Any]) -> None:
        made = getattr(self.header, part)
        different = {name: value for name, value in asked.items() if made.get(name) != value}
        if different:
            wrong = [f"{name} {made.get(name)}, not {value}" for name, value in different.items()]
            raise WrongCache(
                f"{self.where()} was made with other {part}: {'; '.join(wrong)}. Train with what it was made with, or "
                "make another one"
            )

    def where(self) -> str:
        return f"the cache of {self.train_order.sources[0].shards[0]}"

    def train_preparation(self) -> CachedPreparation:
        return CachedPreparation(self.drops, self.header.sizes)

    def val_preparation(self) -> Preparation:
        return Preparation(
            self.image_size_px,
            self.reference_size_px,
            self.latent_shape,
            NO_DROPS,
            self.background,
            self.max_pixels,
            reference_fit=self.reference_fit,
        )


def open_caches(
    train: Shards | None, caches: Mapping[str, Mapping[str, Any]], schemes: Sequence[str] = TRUSTED
) -> list[CacheSource]:
    """The sources that are asked for, all made alike; raises ``WrongCache`` when they are not, ValueError for none."""
    if (train is None) == (not caches):
        raise UserError(
            "say data.train=SHARDS, what `python -m ipa.tools.precompute` wrote, or "
            "+data.caches.NAME.shards=SHARDS for each of several sources"
        )
    if train is not None:
        return [CacheSource.of(train, schemes=schemes)]
    sources = [
        CacheSource.of(**values, option=f"data.caches.{name}", schemes=schemes) for name, values in caches.items()
    ]
    for name, source in zip(caches, sources, strict=True):
        if source.name != name:
            raise WrongCache(f"data.caches.{name} was made from {source.name}: call it so, since draws depend on it")
        differences = source.header.differences(sources[0].header)
        if wrong := [each for each in differences if each.partition(":")[0] not in OWN]:
            raise WrongCache(f"data.caches.{name} was not made as {sources[0].name} was: {'; '.join(wrong)}")
    return sources


def frozen_choices(data: ShardDataModule, layout: Layout) -> dict[str, Any]:
    """What a cache of a source freezes, by the names of the options; raises UserError for what is random."""
    refuse_random(data.crop, data.augment, data.background, layout.references)
    return {
        "crop": data.crop,
        "reference_fit": data.reference_fit,
        "background": only_colour(data.background),
        "buckets": bucket_list(data.train_order.buckets),
        "max_pixels": data.max_pixels,
        "headroom": data.headroom,
        "captions": "all of " + repr(layout.captions),
        "reference": list(layout.references),
        "filters": repr(layout.filters),
    }


def refuse_random(
    crop: str, augment: Augmentation | None, background: Background | None, references: Sequence[str] = ()
) -> None:
    """Raise UserError naming what asks for another draw in each pass, which a cache cannot give."""
    asked = [f"data.crop={crop} (say center)"] if crop == "random" else []
    if augment is not None and augment != Augmentation():
        asked.append(f"data.augment={augment} (say null)")
    if background is not None and only_colour(background) is None:
        asked.append(f"data.background, white={background.white:g} and {len(background.colours)} colours (say null)")
    if len(references) > 1:
        asked.append(f"data.reference=[{', '.join(references)}], one of them at random (say one)")
    if asked:
        raise UserError(f"a cache holds one picture of each sample and cannot draw it anew: {'; '.join(asked)}")


def only_colour(background: Background) -> str | None:
    """The colour that all pictures are laid on; None when it is drawn."""
    if background.white == 1:
        return "white"
    colours = set(background.colours)
    return colours.pop() if background.white == 0 and len(colours) == 1 else None


def bucket_list(buckets: Buckets | None) -> list[list[int]] | None:
    return None if buckets is None else [list(size) for size in buckets.sizes]
