"""Feature shards: what the frozen parts made of each sample, so that their cost is spent once.

A shard of the cache is a tar with the name of the shard that it was made from:

    cache.header.json     what made it: source, fingerprints of the frozen parts, frozen choices, sizes
    KEY.safetensors       a sample: see ``NAMES``; its metadata hold index, captions with their chances, and sizes
    KEY.rejected.json     a sample whose picture could not be used: its index and why
    cache.closing.json    how many samples there are, and how many were rejected for which reason

Samples lie in file order and keep their index, so all that is drawn at a sample's address is as in training from
pictures: order, stand-ins, caption, noise, times, drops. The draw from the posterior is made in training, too.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from ipa.data.addresses import Address, digest
from ipa.data.draws import DropRates, draw, uniform
from ipa.data.members import Member, read_members
from ipa.data.records import Record
from ipa.data.rejects import BROKEN_TAR, Rejected
from ipa.data.shards import TRUSTED, expand_shards, shard_name
from ipa.data.sources import read_weight
from ipa.errors import UserError
from ipa.types import Batch, Features, Position, Posterior

FORMAT, VERSION = "ipa feature cache", 1
HEADER, CLOSING = ("cache", "header.json"), ("cache", "closing.json")
SAMPLE, REJECTED = "safetensors", "rejected.json"

# the tensors of a sample; of pooled_E and reference_3HW what the head uses, or both. M captions
NAMES = {
    "mean_CHW": torch.float16,  # the posterior's, scaled as in ``Posterior``
    "logvar_CHW": torch.float16,
    "pooled_E": torch.float16,
    "reference_3HW": torch.uint8,
    "ids_MNL": torch.int32,
    "size_6": torch.int32,  # as in ``TextCondition``
}
DTYPES = {"F16": np.float16, "U8": np.uint8, "I32": np.int32}

MOST_SAMPLES = 10_000_000  # of a shard

BROKEN_MEMBER = "broken cached sample"
OTHER_BUCKET = "cached for another aspect-ratio bucket"


class WrongCache(UserError):
    """A cache that is none, or that was not made for what it is asked for."""


@dataclass(frozen=True)
class Header:
    """What a shard was made with. ``choices`` go by the names of the options that they were made with."""

    source: str
    fingerprints: dict[str, str] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)

    def written(self) -> bytes:
        return in_json({"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, member: Member, shard: str) -> Header:
        """Raises ``WrongCache`` if this is not the first member of a cached shard."""
        try:
            entries = json.loads(member.content) if (member.key, member.extension) == HEADER else {}
            kind, version = entries.pop("format", None), entries.pop("version", None)
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise WrongCache(f"{shard}: its {'.'.join(HEADER)} is damaged: {error}") from error
        if kind != FORMAT:
            raise WrongCache(
                f"{shard} holds no features: it does not begin with {'.'.join(HEADER)}. data=cache reads what "
                "`python -m ipa.tools.precompute` writes; data=shards reads pictures."
            )
        if version != VERSION:
            raise WrongCache(f"{shard} was written in version {version} of the format, not {VERSION}: make it again")
        try:
            header = cls(**entries)
            check_entries(header)
        except (TypeError, ValueError) as error:
            raise WrongCache(f"{shard}: its {'.'.join(HEADER)} is damaged: {error}") from error
        return header

    @classmethod
    def of_shard(cls, shard: str) -> Header:
        """Of a shard that is opened for it alone; raises ``WrongCache``, or OSError when it cannot be read."""
        members = read_members(shard)
        first = next(members, Member())
        members.close()  # type: ignore[attr-defined]
        if first.broken:
            raise OSError(first.broken.detail)
        return cls.read(first, shard)

    def differences(self, other: Header) -> list[str]:
        """Each entry that is not the same, with this header's value and the other's."""
        mine, others = flat(asdict(self)), flat(asdict(other))
        names = sorted(mine.keys() | others.keys())
        return [f"{n}: {mine.get(n)}, here {others.get(n)}" for n in names if mine.get(n) != others.get(n)]


def check_entries(header: Header) -> None:
    """Raise UserError for a header that says too little, or what is none of it."""
    if not isinstance(header.source, str):
        raise UserError(f"source: {header.source}")
    for part in ("fingerprints", "choices", "sizes"):
        if not isinstance(getattr(header, part), dict):
            raise UserError(f"{part}: {getattr(header, part)}")
    buckets = header.choices.get("buckets") or []
    if not isinstance(buckets, list) or not all(is_size(size) for size in buckets):
        raise UserError(f"buckets: {buckets}")
    kept, latent = header.sizes.get("kept", []), header.sizes.get("latent_shape", [])
    if not set(map(str, kept)) <= {"pooled", "reference"} or not all(isinstance(side, int) for side in latent):
        raise UserError(f"sizes: {header.sizes}")


def is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)


def flat(entries: Mapping[str, Any]) -> dict[str, str]:
    """``{"a": {"b": 1}}`` → ``{"a b": "1"}``, every value in JSON."""
    found: dict[str, str] = {}
    for name, value in entries.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{name} {key}".strip(): json.dumps(entry) for key, entry in inner}
    return found


def in_json(entries: Mapping[str, Any]) -> bytes:
    return json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()


class CacheWriter:
    """Writes one shard into ``file``; the same samples give the same bytes. Without ``close`` it is incomplete."""

    def __init__(self, file: IO[bytes], header: Header) -> None:
        self.tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)
        self.samples = 0
        self.add(".".join(HEADER), header.written())

    def add(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)  # times and owners are zero
        info.size = len(content)
        self.tar.addfile(info, io.BytesIO(content))

    def sample(self, record: Record, tensors: Mapping[str, Tensor], target: tuple[int, int] | None) -> None:
        """``target`` is the aspect bucket that the record was cut to."""
        self.samples += 1
        self.add(f"{record.key}.{SAMPLE}", pack(record, tensors, target))

    def rejected(self, record: Record, reason: str) -> None:
        entry = {"index": record.index, "reason": reason, "size": record.measured}
        self.add(f"{record.key}.{REJECTED}", in_json(entry))

    def close(self, rejects: Mapping[str, int]) -> None:
        """``rejects`` are all of the shard, those with an entry of their own included."""
        self.add(".".join(CLOSING), in_json({"samples": self.samples, "rejects": dict(rejects)}))
        self.tar.close()


def pack(record: Record, tensors: Mapping[str, Tensor], target: tuple[int, int] | None) -> bytes:
    """A sample's bytes. The metadata are one entry, since safetensors writes several in any order."""
    about = {"index": record.index, "captions": record.captions, "size": record.size, "target": target}
    cast = {name: tensors[name].to(dtype).contiguous() for name, dtype in NAMES.items() if name in tensors}
    return save(cast, {"sample": in_json(about).decode()})


def entries_of(data: bytes) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What is said of a sample, what of its tensors, and where these begin; raises ``Rejected``."""
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:begin])
        return json.loads(entries.pop("__metadata__")["sample"]), entries, begin
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Rejected(BROKEN_MEMBER, repr(error)) from error


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What is said of a sample, and its arrays, which are views; raises ``Rejected``."""
    about, entries, begin = entries_of(data)
    arrays: dict[str, NDArray[Any]] = {}
    try:
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            dtype: Any = np.dtype(DTYPES[entry["dtype"]])
            count = (end - start) // dtype.itemsize
            arrays[name] = np.frombuffer(data, dtype, count, begin + start).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise Rejected(BROKEN_MEMBER, repr(error)) from error
    return about, arrays


@dataclass(frozen=True)
class CacheSource:
    """Feature shards as a source; its name is that of the source that they were made from, since draws depend on it."""

    name: str
    shards: list[str]
    weight: float
    header: Header

    @classmethod
    def of(
        cls,
        shards: str | Sequence[str],
        weight: float = 1.0,
        option: str = "data",
        schemes: Sequence[str] = TRUSTED,
    ) -> CacheSource:
        """Reads a header in every folder; raises NoShards, ``WrongCache``, ValueError for a weight."""
        found = expand_shards(shards, schemes)
        by_folder = {os.path.dirname(shard): shard for shard in reversed(found)}
        first, *others = reversed(by_folder.values())
        header = Header.of_shard(first)
        for other in others:
            check_same(Header.of_shard(other), header, other)
        return cls(header.source, found, read_weight(weight, f"{option}.weight"), header)

    def read(self, shard: str) -> Iterator[Record | Rejected]:
        """The samples of a shard, in file order; one without its closing member counts as broken off.

        Raises ``WrongCache`` for a shard that was made in another way than the others.
        """
        name, samples, seen = shard_name(shard), 0, Counter[str]()
        closing: dict[str, Any] = {}
        begun = False
        for member in read_members(shard):
            if member.broken:
                yield member.broken
                return
            if member.refused:
                yield member.refused
            elif not begun:
                check_same(Header.read(member, shard), self.header, shard)
                begun = True
            elif (member.key, member.extension) == CLOSING:
                closing = read_closing(member)
            else:
                found = read_record(member, name)
                samples += member.extension == SAMPLE
                seen.update([found.broken.reason] if isinstance(found, Record) and found.broken else [])
                yield found
        if closing.get("samples") != samples:
            yield Rejected(BROKEN_TAR, f"{shard}: it has no {'.'.join(CLOSING)} that fits, so it is not whole")
            return
        yield from map(Rejected, (Counter(closing["rejects"]) - seen).elements())

    def fingerprint(self) -> str:
        return f"{digest(self.header.written().decode(), *map(shard_name, self.shards)):016x}"


def check_same(found: Header, expected: Header, shard: str) -> None:
    if differences := found.differences(expected):
        raise WrongCache(
            f"{shard} was not made as the shards before it: {'; '.join(differences)}. Keep caches that differ in "
            "folders of their own."
        )


def read_record(member: Member, shard: str) -> Record | Rejected:
    try:
        if member.extension == REJECTED:
            entry = json.loads(member.content)
            broken = Rejected(str(entry["reason"]))
            return Record(member.key, shard, number(entry["index"]), b"", (), (), to_size(entry["size"]), [], broken)
        about, _, _ = entries_of(member.content)
        captions = tuple((str(text), float(chance)) for text, chance in about["captions"])
        if not captions:
            raise UserError("no caption")
        size = to_size(about["size"])
        return Record(member.key, shard, number(about["index"]), member.content, captions, measured=size)
    except (Rejected, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Rejected(BROKEN_MEMBER, f"{member.key}: {error}")


def read_closing(member: Member) -> dict[str, Any]:
    """Empty if it cannot be read."""
    try:
        closing = json.loads(member.content)
        rejects = {str(reason): number(times) for reason, times in closing["rejects"].items()}
        return {"samples": number(closing["samples"]), "rejects": rejects}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def number(value: Any) -> int:
    """A count or an index; raises UserError for what is none, or beyond what a shard holds."""
    if type(value) is not int or not 0 <= value <= MOST_SAMPLES:
        raise UserError(f"{value} is no number of samples")
    return value


def to_size(size: Any) -> tuple[int, int] | None:
    """Raises UserError for what is no size."""
    if size is None:
        return None
    if not is_size(list(size)):
        raise UserError(f"{size} is no size")
    return size[0], size[1]


@dataclass
class CachedSample:
    """A sample out of the cache; ``address`` as in ``Sample``."""

    arrays: dict[str, NDArray[Any]]
    text: str
    ids_NL: NDArray[Any]
    record: Record
    address: Address


@dataclass(frozen=True)
class CachedPreparation:
    """Cached records → samples → batches, with the draws that ``Preparation`` makes."""

    drops: DropRates = field(default_factory=DropRates)
    sizes: Mapping[str, Any] | None = None  # the header's, which every sample is to have; None: any

    def sample(self, record: Record, address: Address, target: tuple[int, int] | None = None) -> CachedSample:
        """Raises ``Rejected`` for what was not usable when the cache was made, and for another ``target`` than then."""
        if record.broken:
            raise Rejected(record.broken.reason)  # a new one: each raise adds to an exception's traceback
        about, arrays = unpack(record.picture)
        try:
            made_for = to_size(about["target"])
        except (KeyError, TypeError, ValueError) as error:
            raise Rejected(BROKEN_MEMBER, repr(error)) from error
        if target != made_for:
            raise Rejected(OTHER_BUCKET, f"{record.key}: {made_for}, not {target}")
        self.check(arrays, len(record.captions), made_for)
        text = record.caption(uniform(address, "caption"))
        chosen = [known for known, _ in record.captions].index(text)
        return CachedSample(arrays, text, arrays.pop("ids_MNL")[chosen], record, address)

    def check(self, arrays: Mapping[str, NDArray[Any]], captions: int, target: tuple[int, int] | None) -> None:
        """Whether these are all arrays of a sample, in the shapes that they have in the whole cache; ``Rejected``."""
        needed = {"mean_CHW", "logvar_CHW", "ids_MNL", "size_6"}
        wrong = [
            name for name, array in arrays.items() if name not in NAMES or array.ndim != len(name.partition("_")[2])
        ]
        if "size_6" in wrong and arrays["size_6"].shape == (6,):
            wrong.remove("size_6")
        if wrong or not needed <= arrays.keys() or arrays["ids_MNL"].shape[0] != captions:
            raise Rejected(BROKEN_MEMBER, f"arrays {', '.join(arrays)}")
        if arrays["mean_CHW"].shape != arrays["logvar_CHW"].shape or not self.fits(arrays, target):
            raise Rejected(BROKEN_MEMBER, f"arrays of {[array.shape for array in arrays.values()]}")

    def fits(self, arrays: Mapping[str, NDArray[Any]], target: tuple[int, int] | None) -> bool:
        """Whether the shapes are those that the header tells; of buckets only what does not depend on them."""
        if self.sizes is None:
            return True
        edge, kept = self.sizes["reference_size_px"], self.sizes["kept"]
        shape = tuple(self.sizes["latent_shape"])
        latents = arrays["mean_CHW"].shape == shape if target is None else arrays["mean_CHW"].shape[:1] == shape[:1]
        reference = arrays["reference_3HW"].shape == (3, edge, edge) if "reference" in kept else True
        return latents and reference and ("pooled" not in kept or "pooled_E" in arrays)

    def batch(self, samples: Sequence[CachedSample], rejects: Counter[str], position: Position | None = None) -> Batch:
        """Samples of one size, stacked, with their draws."""
        stacked = {name: stack([sample.arrays[name] for sample in samples]) for name in samples[0].arrays}
        pooled_BE = stacked.get("pooled_E")
        channels, height, width = samples[0].arrays["mean_CHW"].shape
        return Batch(
            text=[sample.text for sample in samples],
            draws=draw([sample.address for sample in samples], (channels, height, width), self.drops),
            reference_B3HW=stacked.get("reference_3HW"),
            posterior=Posterior(stacked["mean_CHW"], stacked["logvar_CHW"]),
            features=None if pooled_BE is None else Features(pooled_BE=pooled_BE),
            text_inputs={"ids": stack([sample.ids_NL for sample in samples]).long().flatten(1)},
            size_B6=stacked["size_6"].long(),
            keys=[sample.record.key for sample in samples],
            shards=[sample.record.shard for sample in samples],
            rejects=dict(rejects),
            position=position,
        )


def stack(arrays: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
