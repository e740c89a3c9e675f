"""The pairing index: for each sample where it is, and its groups; one file that every data worker maps into memory.

The file is in safetensors' format, with one row per sample of each shard, usable or not. R rows, S shards, and at each
level of ``by`` G groups with M members in all:

    shard_rows [S+1]            the first row of each shard; row = shard_rows[shard] + index of the sample in it
    offsets, lengths [R]        where the sample is in its shard, in bytes
    keys [R]                    64 bits of a hash of its key
    differs [R]                 an id of its value of ``differ``; its own row without that option
    groups.L [R]                its group at level L, -1 without one
    starts.L [G+1]              group g has the members starts[g] to starts[g+1]
    members.L, differs.L [M]    their rows and ids, sorted by id

A partner is a member of the group with another id, so that a sample is never its own partner: finding one takes two
binary searches, whatever the size of the group.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ipa.errors import UserError
from ipa.files import write_atomically

FORMAT, VERSION = "ipa pairing index", 1
REMAKE = "make it again with `python -m ipa.tools.pair`"

Array = NDArray[Any]


class WrongIndex(UserError):
    """Not a pairing index, or one of other shards or options."""


class Place(NamedTuple):
    """Where sample ``number`` of a shard is, in bytes; the ``length`` is 0 if its picture could not be cached."""

    source: str
    shard: str
    number: int
    offset: int
    length: int
    key: int


@dataclass(frozen=True)
class Index:
    """``about`` is the file's metadata: ``by``, ``differ``, ``of`` (pictures or features), ``sources``, ``report``."""

    path: str
    about: dict[str, Any]
    arrays: Mapping[str, Array]

    @cached_property
    def shards(self) -> list[tuple[str, str]]:
        """Source and name of every shard, in the order of their rows."""
        return [(source["name"], name) for source in self.about["sources"] for name, _, _ in source["shards"]]

    @cached_property
    def numbers(self) -> dict[tuple[str, str], int]:
        return {shard: number for number, shard in enumerate(self.shards)}

    def row(self, source: str, shard: str, index: int, key: str) -> int:
        """Raises ``WrongIndex`` for a sample that was not there when the index was made."""
        rows, number = self.arrays["shard_rows"], self.numbers[source, shard]
        row = int(rows[number]) + index
        if row >= rows[number + 1] or int(self.arrays["keys"][row]) != key_hash(key):
            raise WrongIndex(f"{self.path} does not know sample {key} of {shard}: the shard has changed; {REMAKE}")
        return row

    def partner(self, row: int, number: int) -> int:
        """A row of the finest group that has another ``differs``, chosen by any large ``number``; else ``row``."""
        differs = int(self.arrays["differs"][row])
        for level in range(len(self.about["by"])):
            group = int(self.arrays[f"groups.{level}"][row])
            if group < 0:
                continue
            begin, end = self.arrays[f"starts.{level}"][group : group + 2].tolist()
            ids = self.arrays[f"differs.{level}"]
            left, right = bisect_left(ids, differs, begin, end), bisect_right(ids, differs, begin, end)
            if others := end - begin - (right - left):
                place = begin + number % others
                return int(self.arrays[f"members.{level}"][place + (right - left) * (place >= left)])
        return row

    def place(self, row: int) -> Place:
        rows = self.arrays["shard_rows"]
        number = bisect_right(rows, row) - 1
        where = (int(self.arrays[name][row]) for name in ("offsets", "lengths", "keys"))
        return Place(*self.shards[number], row - int(rows[number]), *where)

    def fingerprint(self) -> str:
        """Of the groups, wherever the samples are stored."""
        return str(self.about["fingerprint"])


def key_hash(key: str) -> int:
    hashed = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(hashed, "big") or 1  # 0 is a row without a sample


def write_index(path: Path, about: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    about = {"format": FORMAT, "version": VERSION, **about}
    metadata = {"index": json.dumps(about)}
    write_atomically(path, lambda temporary: save_file(dict(arrays), temporary, metadata), "choose another file")


@lru_cache(maxsize=4)
def open_index(path: str) -> Index:
    """Map an index into memory; raises ``WrongIndex`` for a file that is missing, cut short or no index.

    Kept per process, so data workers that are forked share the pages, and others open the file themselves.
    """
    if not os.path.isfile(path):
        raise WrongIndex(f"there is no pairing index {path}: make it with `python -m ipa.tools.pair … out={path}`")
    try:
        with safe_open(path, "pt") as file:  # which maps it, as "np" does not
            about = json.loads(file.metadata()["index"])
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        kind, version = about["format"], about["version"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WrongIndex(f"{path} is no pairing index, or a damaged one ({error}); {REMAKE}") from error
    if (kind, version) != (FORMAT, VERSION):
        raise WrongIndex(f"{path} is version {version} of '{kind}', not version {VERSION} of '{FORMAT}'; {REMAKE}")
    return Index(path, about, arrays)
