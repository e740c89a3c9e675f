"""The format of the feature cache: what the frozen parts computed for each sample, so that its cost is paid once.

A shard of the cache is a tar with the name of the shard that it was made from:

    cache.header.json     how it was made: source, fingerprints of the frozen parts, frozen options, sizes
    KEY.safetensors       a sample: its tensors (``DTYPES``), and ids or states of its captions (``cache.states``);
                          its metadata are index, captions with probabilities, sizes
    KEY.rejected.json     a sample whose picture could not be used: its index and the reason
    cache.closing.json    how many samples there are, and how many were rejected for which reason

Samples are stored in file order and keep their index, so everything that is drawn at a sample's address is the same as
in training from pictures. The posterior is sampled in training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor
from webdataset import TarWriter

from ipa.data.records import Record, Size
from ipa.data.rejects import Reason, Rejected
from ipa.errors import UserError

FORMAT, VERSION = "ipa feature cache", 1
HEADER, CLOSING = "cache.header.json", "cache.closing.json"
SAMPLE, REJECTED = "safetensors", "rejected.json"

# The tensors of a sample: of pooled_E and reference_3HW what the head uses, or both.
DTYPES = {
    "mean_CHW": torch.float16,  # the posterior's, scaled as in ``Posterior``
    "logvar_CHW": torch.float16,
    "pooled_E": torch.float16,
    "reference_3HW": torch.uint8,
    "mask_1HW": torch.uint8,  # the loss mask, of the latents' size
    "size_6": torch.int32,  # as in ``TextCondition``
}
TEXT = "text."  # begins the names of what ``Family.prepare_text`` gives: a row for each caption
STATES, SCALE = "states.", ".scale"  # the same for ``Family.text_states``
KINDS = ("states", "states_fp8")

# numpy has no bfloat16 and no float8
STORED: dict[str, type[np.generic]] = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "U8": np.uint8}
STORED |= {"BF16": np.uint16, "F8_E4M3": np.uint8}
# what Python raises for damaged JSON, or for entries of another type than ours
DAMAGED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
MAX_SAMPLES = 10_000_000  # of a shard
MAX_STATE = 1 << 26  # numbers of a text's state; T5's 512 tokens of FLUX have 2 million


class WrongCache(UserError):
    """Not a cache, or not one that was made for this training."""


@dataclass(frozen=True)
class Header:
    """How a shard was made. ``choices`` have the names of the options that decided them."""

    source: str
    fingerprints: dict[str, str] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)

    def written(self) -> bytes:
        return in_json({"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, name: str, content: bytes, shard: str) -> Header:
        """From the first member of a shard; raises ``WrongCache`` if that is no header."""
        try:
            entries = json.loads(content) if name == HEADER else {}
            kind, version = entries.pop("format", None), entries.pop("version", None)
            if (kind, version) == (FORMAT, VERSION):
                header = cls(**entries)
                header.check()
                return header
        except DAMAGED as error:
            raise WrongCache(f"{shard}: its {HEADER} is damaged: {error}") from error
        if kind == FORMAT:
            raise WrongCache(f"{shard} was written in version {version} of the format, not {VERSION}: make it again")
        raise WrongCache(
            f"{shard} holds no features: it does not begin with {HEADER}. data=cache reads what "
            "`python -m ipa.tools.precompute` writes; data=shards reads pictures."
        )

    def check(self) -> None:
        """Raise one of ``DAMAGED`` for entries that are missing or have a wrong type."""
        kept, text = self.sizes.get("kept", []), self.sizes.get("text")
        buckets = self.choices.get("buckets")
        right = {
            "source": isinstance(self.source, str),
            "fingerprints": isinstance(self.fingerprints, dict),
            "choices": buckets is None or (bool(buckets) and all(is_shape(size, 2) for size in buckets)),
            "sizes": {*kept} <= {"pooled", "reference"} and is_shape(self.sizes.get("latent_shape", [1] * 3), 3),
            "text": text is None or (isinstance(text, dict) and is_text(text)),
        }
        if wrong := [name for name, is_right in right.items() if not is_right]:
            raise ValueError(f"{wrong[0]}: {self.sizes.get(wrong[0], getattr(self, wrong[0], None))}")

    @property
    def state_shapes(self) -> dict[str, list[int]]:
        """Name → shape of a caption's states; empty for a cache of token ids."""
        return (self.sizes.get("text") or {}).get("shapes", {})

    def with_states(self, kind: str, shapes: Mapping[str, Sequence[int]], encoder: str) -> Header:
        """Of the same samples with text states in place of ids; ``encoder`` is the text encoders' fingerprint."""
        sizes = self.sizes | {"text": {"kept": kind, "shapes": dict(shapes)}}
        return replace(self, sizes=sizes, fingerprints=self.fingerprints | {"text_encoder": encoder})

    def with_ids(self) -> Header:
        """The inverse of ``with_states``."""
        sizes = {name: value for name, value in self.sizes.items() if name != "text"}
        found = {name: value for name, value in self.fingerprints.items() if name != "text_encoder"}
        return replace(self, sizes=sizes, fingerprints=found)

    def differences(self, other: Header) -> list[str]:
        """Each entry that differs, with this header's value and the other's."""
        mine, others = flat(asdict(self)), flat(asdict(other))
        names = sorted(mine.keys() | others.keys())
        return [f"{n}: {mine.get(n)}, here {others.get(n)}" for n in names if mine.get(n) != others.get(n)]


def is_text(text: Any) -> bool:
    """Whether it says which states are kept of a caption, and their shapes: L × D, E or L."""
    shapes = text["shapes"].values()
    fits = all(is_shape(shape, 1, 2) and math.prod(shape) <= MAX_STATE for shape in shapes)
    return text["kept"] in KINDS and bool(shapes) and fits


def is_shape(value: Any, *dimensions: int) -> bool:
    """Whether it is a list of so many positive integers."""
    is_list = isinstance(value, list) and len(value) in dimensions
    return is_list and all(type(side) is int and side > 0 for side in value)


def flat(entries: Mapping[str, Any]) -> dict[str, str]:
    """``{"a": {"b": 1}}`` → ``{"a b": "1"}``, every value in JSON."""
    found: dict[str, str] = {}
    for name, value in entries.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{name} {key}".strip(): json.dumps(entry, sort_keys=True) for key, entry in inner}
    return found


def in_json(entries: Mapping[str, Any]) -> bytes:
    return json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()


class CacheWriter:
    """Writes one shard into ``file``; the same samples give the same bytes. Without ``close`` it is incomplete."""

    def __init__(self, file: IO[bytes], header: Header) -> None:
        options: dict[str, Any] = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "format": "PAX_FORMAT"}
        self.tar = TarWriter(file, encoder=False, **options)
        self.samples = 0
        self.add("cache", "header.json", header.written())

    def add(self, key: str, extension: str, content: bytes) -> None:
        self.tar.write({"__key__": key, extension: content})

    def sample(self, record: Record, tensors: Mapping[str, Tensor], target: Size | None) -> None:
        """``tensors``: see ``pack``; ``target`` is the record's aspect-ratio bucket."""
        self.samples += 1
        self.add(record.key, SAMPLE, pack(record, tensors, target))

    def rejected(self, record: Record, reason: str) -> None:
        self.add(record.key, REJECTED, in_json({"index": record.index, "reason": reason, "size": record.measured}))

    def close(self, rejects: Mapping[str, int]) -> None:
        """``rejects`` counts all of the shard, including those with an entry of their own."""
        self.add("cache", "closing.json", in_json({"samples": self.samples, "rejects": dict(rejects)}))
        self.tar.close()


def pack(record: Record, tensors: Mapping[str, Tensor], target: Size | None) -> bytes:
    """A sample's bytes, from the tensors in ``DTYPES``, and ``text.NAME`` or ``states.NAME``, a row for each caption.

    The metadata are one entry, since safetensors writes several in any order.
    """
    about = {"index": record.index, "captions": record.captions, "size": record.size, "target": target}
    cast = {name: tensors[name].to(dtype).contiguous() for name, dtype in DTYPES.items() if name in tensors}
    cast |= {name: x.to(torch.int32).contiguous() for name, x in tensors.items() if name.startswith(TEXT)}
    cast |= {name: x for name, x in tensors.items() if name.startswith(STATES)}
    return save(cast, {"sample": in_json(about).decode()})


def with_states(data: bytes, states: Mapping[str, Tensor]) -> bytes:
    """A sample's bytes with text states in place of its ids."""
    about, _, _ = entries_of(data)
    others = {name: x for name, x in load(data).items() if not name.startswith(TEXT)}
    return save({**others, **states}, {"sample": in_json(about).decode()})


def entries_of(data: bytes, name: str = "sample") -> tuple[dict[str, Any], dict[str, Any], int]:
    """The metadata ``name`` of a file, the entries of its tensors, and where these begin; raises ``Rejected``."""
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:begin])
        return json.loads(entries.pop("__metadata__")[name]), entries, begin
    except DAMAGED as error:
        raise Rejected(Reason.BROKEN_MEMBER, repr(error)) from error


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The metadata of a sample, and its arrays; raises ``Rejected``.

    The arrays are views, since ``safetensors.numpy.load`` copies: that takes 49 µs of the 300 µs of a sample.
    """
    about, entries, begin = entries_of(data)
    arrays: dict[str, NDArray[Any]] = {}
    try:
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            dtype: Any = np.dtype(STORED[entry["dtype"]])
            count = (end - start) // dtype.itemsize
            arrays[name] = np.frombuffer(data, dtype, count, begin + start).reshape(entry["shape"])
    except DAMAGED as error:
        raise Rejected(Reason.BROKEN_MEMBER, repr(error)) from error
    return about, arrays


def to_size(size: Any) -> Size | None:
    """Raises ValueError for anything that is not a size."""
    if size is None:
        return None
    if not is_shape(size, 2):
        raise ValueError(f"{size} is not a size")
    return size[0], size[1]
