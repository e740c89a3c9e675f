"""Training from feature shards as a Lightning datamodule, and which options a cache freezes.

Order, resume and draws are those of ``ShardDataModule`` over the shards that the features were made from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ipa.data.addresses import digest
from ipa.data.cache.format import WrongCache
from ipa.data.cache.preparation import CachedPreparation, state_bytes
from ipa.data.cache.source import CacheSource
from ipa.data.cache.states import Texts, texts_next_to
from ipa.data.datamodule import ShardDataModule, Shards, StreamDataModule
from ipa.data.images.augment import Augmentation
from ipa.data.images.buckets import Buckets, FixedBuckets
from ipa.data.images.preparation import ImagePreparation
from ipa.data.images.transforms import Background
from ipa.data.order.sequence import Order
from ipa.data.pairs.options import Pairs
from ipa.data.shards.names import TRUSTED
from ipa.data.shards.source import Layout, read_masks
from ipa.data.shards.strip import Strip
from ipa.errors import UserError
from ipa.types import TextInputs

log = logging.getLogger(__name__)

# the options behind fingerprints, for messages
DECIDED_BY = {
    "vae": " (base.path, base.dtype, base.vae_dtype)",
    "tokenizer": " (base.path, base.text_tokens, base.t5)",
    "encoder": " (encoder.name or encoder.path, encoder.dtype)",
}
WINDOW_GB = 4  # of text states that a process keeps to shuffle, without a warning
# entries of the header that may differ between the caches of one training
PER_SOURCE = {"source", *(f"choices {name}" for name in ("captions", "filters", "image", "max_pixels", "reference"))}


class CachedDataModule(StreamDataModule):
    """Feature shards → ``Batch``; raises ``NoShards`` or ``WrongCache`` at once if they do not exist or are no cache.

    Either ``train`` names shards, or ``caches`` has several sources by name, each with ``shards`` and ``weight``. The
    cache fixes how pictures are cropped: ``crop``, ``reference_fit``, masks, ``buckets`` and ``background`` must be the
    same, the last two only if they are given, and each sample has one reference. ``texts`` is the file that has, of a
    cache of text states, those of the texts that are no captions. ``options`` are those of ``StreamDataModule``;
    validation reads pictures.
    """

    def __init__(
        self,
        train: Shards | None = None,
        val: Shards | None = None,
        *,
        caches: Mapping[str, Mapping[str, Any]] | None = None,
        buckets: Any = None,
        loss_mask: str | None = None,
        reference_mask: str | None = None,
        texts: str | None = None,
        window: int = 2048,
        seed: int = 0,
        schemes: Sequence[str] = TRUSTED,
        **options: Any,
    ) -> None:
        sources = open_caches(train, caches or {}, schemes)
        self.header, self.bucket_sizes = sources[0].header, buckets
        if self.header.state_shapes:
            self.texts = read_texts(sources, texts)
            warn_of_memory(self.header.state_shapes, window, options.get("num_workers", 1))
        super().__init__(Order(sources, seed, window), val, reference_mask=reference_mask, schemes=schemes, **options)
        asked = {"loss_mask": loss_mask or None, **image_choices(self.images)}
        asked["reference_mask"] = list(read_masks(reference_mask, 1, "data.reference_mask")) or None
        if options.get("background") is None:
            del asked["background"]
        self.require("choices", asked | {"pairs.strip": strip_choice(Pairs.of(options.get("pairs")).strip)})

    def fit_to(self, *, image_size_px: int, reference_size_px: int, latent_shape: Sequence[int]) -> None:
        """Check the sizes of the loaded models; raises ``WrongCache`` if the cache was made with others."""
        sizes = {"image_size_px": image_size_px, "reference_size_px": reference_size_px}
        self.require("sizes", sizes | {"latent_shape": list(latent_shape)})
        super().fit_to(**sizes, latent_shape=latent_shape)
        if self.bucket_sizes is not None:
            self.require("choices", {"buckets": bucket_list(Buckets.of(self.bucket_sizes, image_size_px))})
        if (buckets := self.header.choices.get("buckets")) is not None:
            self.train_order.buckets = FixedBuckets(tuple((width, height) for width, height in buckets))

    def train_preparation(self) -> CachedPreparation:
        return CachedPreparation(self.images.drops, self.header.sizes, self.partners)

    def check_model(self, model: Any) -> None:
        """Raise ``WrongCache`` unless the frozen parts are those that the cache was made with."""
        kept, uses = self.header.sizes.get("kept", []), model.head.uses
        needed = {"pooled": {"pooled", "reference"}, "patches": {"reference"}}[uses]
        if not needed.intersection(kept):
            raise WrongCache(
                f"{self.where()} keeps {' and '.join(kept)} of each reference, but the head reads its {uses} features: "
                f"make a cache with the same tokens=, or with keep=[{', '.join(sorted(needed))}]"
            )
        found = model.fingerprints()
        if uses == "patches" or "pooled" not in kept:
            found.pop("encoder")  # its features are not used
        self.require("fingerprints", found)

    def require(self, part: str, asked: Mapping[str, Any]) -> None:
        made = getattr(self.header, part)
        if different := {name: value for name, value in asked.items() if made.get(name) != value}:
            wrong = [
                f"{name} {made.get(name)}, not {value}{DECIDED_BY.get(name, '')}" for name, value in different.items()
            ]
            raise WrongCache(
                f"{self.where()} was made with other {part}: {'; '.join(wrong)}. Train with what it was made with, or "
                "make another one"
            )

    def where(self) -> str:
        return f"the cache of {self.train_order.sources[0].shards[0]}"


def open_caches(
    train: Shards | None, caches: Mapping[str, Mapping[str, Any]], schemes: Sequence[str] = TRUSTED
) -> list[CacheSource]:
    """The sources; raises ``WrongCache`` if they were made differently, UserError if none is given."""
    if (train is None) == (not caches):
        raise UserError(
            "give data.train=SHARDS, written by `python -m ipa.tools.precompute`, or "
            "+data.caches.NAME.shards=SHARDS for each of several sources"
        )
    if train is not None:
        return [CacheSource.of(train, schemes=schemes)]
    sources = [
        CacheSource.of(**values, option=f"data.caches.{name}", schemes=schemes) for name, values in caches.items()
    ]
    for name, source in zip(caches, sources, strict=True):
        if source.name != name:
            raise WrongCache(f"data.caches.{name} was made from {source.name}: use that name, since draws depend on it")
        differences = source.header.differences(sources[0].header)
        if wrong := [each for each in differences if each.partition(":")[0] not in PER_SOURCE]:
            raise WrongCache(f"data.caches.{name} was not made as {sources[0].name} was: {'; '.join(wrong)}")
    return sources


def read_texts(sources: Sequence[CacheSource], given: str | None) -> dict[str, TextInputs]:
    """Of all sources; raises ``WrongCache`` for texts that other text encoders have encoded than the captions."""
    known: dict[str, TextInputs] = {}
    for source in sources:
        place = given or texts_next_to(source.shards[0])
        found, made = Texts.read(place), source.header.fingerprints.get("text_encoder")
        if found.encoder != made:
            raise WrongCache(f"{place} was made with the text encoders {found.encoder}, the captions with {made}")
        known |= found.states
    return known


def warn_of_memory(shapes: Mapping[str, Sequence[int]], window: int, workers: int) -> None:
    size_gb = max(1, workers) * window * state_bytes(shapes) / 1e9
    if size_gb > WINDOW_GB:
        log.warning(
            "each process keeps up to %.0f GB of text states to shuffle (data.window=%d records in each of %d data "
            "workers): give a smaller data.window= or fewer data.num_workers=",
            *(size_gb, window, workers),
        )


def frozen_choices(data: ShardDataModule, layout: Layout) -> dict[str, Any]:
    """The options that a cache of a source freezes; raises UserError for random ones.

    Those that came later are left out where they are not used, so older caches stay the same.
    """
    images = data.images
    later = {
        "image": list(layout.images),
        "pairs.strip": strip_choice(layout.strip),
        "loss_mask": layout.loss_mask,
        "reference_mask": list(layout.reference_masks),
    }
    return {
        **image_choices(images, layout.references),
        "buckets": bucket_list(data.train_order.buckets),
        "max_pixels": images.max_pixels,
        "headroom": images.headroom,
        "captions": "all of " + repr(layout.captions),
        "reference": list(layout.references),
        "filters": repr(layout.filters),
        **{name: value for name, value in later.items() if value},
    }


def image_choices(images: ImagePreparation, references: Sequence[str] = ()) -> dict[str, Any]:
    """How pictures are cropped and composited; raises UserError naming what is random in each pass."""
    asked = [f"data.crop={images.crop} (use center)"] if images.crop == "random" else []
    if images.augment != Augmentation():
        asked.append(f"data.augment={images.augment} (use null)")
    colour, behind = only_colour(images.background), only_colour(images.reference_background)
    if colour is None:
        number = len(images.background.colours)
        asked.append(f"data.background, white={images.background.white:g} and {number} colours (use null)")
    if behind is None and images.reference_background is not None:
        asked.append("data.reference_background of several colours (give one)")
    if len(references) > 1:
        asked.append(f"data.reference=[{', '.join(references)}], one of them at random (give one)")
    if images.references.most > 1:
        chances = list(images.references.chances)
        asked.append(f"data.references.chances={chances} (a cache has one reference each: use [1])")
    if asked:
        raise UserError(f"a cache holds each picture once, so nothing in it can be random: {'; '.join(asked)}")
    chosen = {"crop": images.crop, "reference_fit": images.reference_fit, "background": colour}
    return chosen if behind is None else chosen | {"reference_background": behind}


def only_colour(background: Background | None) -> str | None:
    """The colour that all pictures are composited on; None if it is random, or none is given."""
    if background is None or background.white == 1:
        return "white" if background else None
    colours = set(background.colours)
    return colours.pop() if background.white == 0 and len(colours) == 1 else None


def strip_choice(strip: Strip) -> str | None:
    """The captions in a cache were stripped when it was made."""
    if not strip.parts:
        return None
    return f"{len(strip.terms)} terms and {len(strip.names)} entries, {digest(*strip.parts):016x}"


def bucket_list(buckets: Buckets | None) -> list[list[int]] | None:
    return None if buckets is None else [list(size) for size in buckets.sizes]
