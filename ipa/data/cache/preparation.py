"""Cached records → samples → batches, with the draws that ``ImagePreparation`` makes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ipa.data.addresses import Address, DropRates, draw
from ipa.data.cache.format import DAMAGED, DTYPES, STATES, STORED, TEXT, to_size, unpack
from ipa.data.cache.states import from_stored
from ipa.data.pairs.index import Place
from ipa.data.pairs.partners import BrokenPartner, Partners
from ipa.data.records import Record, Size, make_batch
from ipa.data.rejects import Reason, Rejected
from ipa.types import Batch, EncoderWidths, Features, Position, Posterior, TextInputs

REFERENCE = ("pooled_E", "reference_3HW")
# what a cache keeps of a reference, by what the head reads: patch features would need four times its space
KEPT = {"pooled": "pooled", "patches": "reference"}
HEAD_BYTES = 2048  # most headers of samples are shorter


@dataclass
class CachedSample:
    """A sample from the cache; its ids or its states are of the chosen caption, ``address`` as in ``Sample``."""

    arrays: dict[str, NDArray[Any]]
    text: str
    text_inputs: dict[str, NDArray[Any]]
    text_states: TextInputs
    record: Record
    address: Address


@dataclass(frozen=True)
class CachedPreparation:
    """``sizes`` are the header's, which every sample must have; None accepts any. ``partners`` lend the reference."""

    drops: DropRates = field(default_factory=DropRates)
    sizes: Mapping[str, Any] | None = None
    partners: Partners | None = None

    @property
    def sample_bytes(self) -> int:
        """The posterior's mean and logvar in fp16, two draws of noise, text states, the reference if it was kept."""
        sizes = self.sizes or {"latent_shape": (), "kept": ()}
        reference = 3 * sizes["reference_size_px"] ** 2 if "reference" in sizes["kept"] else 0
        return 12 * math.prod(sizes["latent_shape"]) + state_bytes(self.state_shapes) + reference

    @property
    def state_shapes(self) -> Mapping[str, Sequence[int]]:
        return (self.sizes or {}).get("text", {}).get("shapes", {})

    def sample(self, record: Record, address: Address, target: Size | None = None) -> CachedSample:
        """Raises ``Rejected`` for what was unusable when the cache was made, and for another ``target`` than then."""
        if record.broken:
            raise record.broken.at(record.key, record.shard)
        about, arrays = unpack(record.picture)
        rows = {name: arrays.pop(name) for name in list(arrays) if name.startswith((TEXT, STATES))}
        text = address.choose("caption", record.captions)
        chosen = [known for known, _ in record.captions].index(text)
        try:
            made_for = to_size(about["target"])
            self.check(arrays, made_for)
            if any(array.ndim < 2 or len(array) != len(record.captions) for array in rows.values()):
                raise ValueError("as many texts as captions")
            row = {name: array[chosen] for name, array in rows.items()}
            ids = {name.removeprefix(TEXT): array for name, array in row.items() if name.startswith(TEXT)}
            states = from_stored(row, self.state_shapes)
            if bool(ids) == bool(states):
                raise ValueError("either token ids or states")
        except (*DAMAGED, RuntimeError) as error:
            raise Rejected(Reason.BROKEN_MEMBER, f"{error!r}; it has {', '.join([*arrays, *rows])}") from error
        if target != made_for:
            raise Rejected(Reason.OTHER_BUCKET, f"{record.key}: {made_for}, not {target}")
        if self.partners is not None and (place := self.partners.choose(record, address)):
            arrays |= lent_arrays(place, arrays, self.partners)
        return CachedSample(arrays, text, ids, states, record, address)

    def check(self, arrays: Mapping[str, NDArray[Any]], target: Size | None) -> None:
        """Raise ValueError unless these are all arrays of a sample, in the shapes of the whole cache."""
        shapes = {name: array.shape for name, array in arrays.items()}
        known = all(name in DTYPES and len(shape) == len(name.partition("_")[2]) for name, shape in shapes.items())
        if not known or shapes["mean_CHW"] != shapes["logvar_CHW"] or shapes["size_6"] != (6,):
            raise ValueError("other arrays")
        if not self.fits(shapes, target):
            raise ValueError(f"arrays of {list(shapes.values())}")

    def fits(self, shapes: Mapping[str, tuple[int, ...]], target: Size | None) -> bool:
        """Whether the shapes are the header's; with buckets only what does not depend on them."""
        if self.sizes is None:
            return True
        edge, kept, latent = self.sizes["reference_size_px"], self.sizes["kept"], tuple(self.sizes["latent_shape"])
        latents = shapes["mean_CHW"] == latent if target is None else shapes["mean_CHW"][:1] == latent[:1]
        latents = latents and shapes.get("mask_1HW", (1, *shapes["mean_CHW"][1:])) == (1, *shapes["mean_CHW"][1:])
        reference = shapes.get("reference_3HW") == (3, edge, edge) if "reference" in kept else True
        return latents and reference and ("pooled" not in kept or "pooled_E" in shapes)

    def batch(
        self, samples: Sequence[CachedSample], rejects: Sequence[Rejected], position: Position | None = None
    ) -> Batch:
        masks = [to_mask(sample.arrays.get("mask_1HW")) for sample in samples]
        stacked = stack([{name: x for name, x in sample.arrays.items() if name != "mask_1HW"} for sample in samples])
        pooled_BE = stacked.get("pooled_E")
        channels, height, width = samples[0].arrays["mean_CHW"].shape
        draws = draw([sample.address for sample in samples], (channels, height, width), self.drops)
        ids = {name: x.long() for name, x in stack([sample.text_inputs for sample in samples]).items()}
        states = [sample.text_states for sample in samples]
        return make_batch(
            *(samples, draws, rejects, position),
            masks=masks,
            reference_B3HW=stacked.get("reference_3HW"),
            posterior=Posterior(stacked["mean_CHW"], stacked["logvar_CHW"]),
            features=None if pooled_BE is None else Features(pooled_BE=pooled_BE),
            text_inputs=ids or None,
            text_states={name: torch.stack([each[name] for each in states]) for name in states[0]} or None,
            size_B6=stacked["size_6"].long(),
        )


def cached_bytes(latent_shape: Sequence[int], encoder: EncoderWidths, kept: Sequence[str]) -> int:
    """Of a sample without its captions: mean and logvar in fp16, and what is ``kept`` of the reference."""
    reference = {"pooled": 2 * encoder.pooled, "reference": 3 * encoder.image_size_px**2}
    return 4 * math.prod(latent_shape) + sum(reference[name] for name in kept)


def state_bytes(shapes: Mapping[str, Sequence[int]]) -> int:
    """Of a text's states in bfloat16, nothing left out."""
    return sum(2 * math.prod(shape) for shape in shapes.values())


def lent_arrays(place: Place, own: Mapping[str, NDArray[Any]], partners: Partners) -> dict[str, NDArray[Any]]:
    """What the cache keeps of the partner's reference, and nothing else of it; raises ``BrokenPartner``."""
    head = partners.part(place, 0, min(HEAD_BYTES, place.length))
    if (begin := 8 + int.from_bytes(head[:8], "little")) > len(head):
        head = partners.part(place, 0, min(begin, place.length))
    if b'\\"index\\":%d,' % place.number not in head[:begin]:
        raise partners.changed(place)
    try:
        entries = json.loads(head[8:begin])
        where = {name: read_entry(entries[name], own[name]) for name in REFERENCE if name in own}
    except DAMAGED as error:
        raise BrokenPartner.of(Rejected(Reason.BROKEN_MEMBER, repr(error)), place) from None
    read = {name: partners.part(place, begin + start, length) for name, (start, length) in where.items()}
    return {name: np.frombuffer(data, own[name].dtype).reshape(own[name].shape) for name, data in read.items()}


def read_entry(entry: Mapping[str, Any], like: NDArray[Any]) -> tuple[int, int]:
    """Begin and length of an array; raises ValueError unless it has the shape and type of another sample's."""
    start, end = entry["data_offsets"]
    if tuple(entry["shape"]) != like.shape or STORED[entry["dtype"]] != like.dtype or end - start != like.nbytes:
        raise ValueError(f"{entry} is not like {like.dtype} {like.shape}")
    return start, like.nbytes


def to_mask(array: NDArray[Any] | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array.copy())


def stack(rows: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
