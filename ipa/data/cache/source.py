"""Feature shards as a source of records."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from webdataset.tariterators import base_plus_ext

from ipa.data.addresses import digest
from ipa.data.cache.format import (
    CLOSING,
    DAMAGED,
    MAX_SAMPLES,
    REJECTED,
    SAMPLE,
    Header,
    WrongCache,
    entries_of,
    to_size,
)
from ipa.data.records import Record, Source
from ipa.data.rejects import Reason, Rejected
from ipa.data.shards.names import TRUSTED, expand_shards, shard_name
from ipa.data.shards.source import read_weight
from ipa.data.shards.tar import BLOCK_BYTES, Member, read_members


@dataclass(frozen=True)
class CacheSource(Source):
    """Feature shards as a source; its name is that of the source that they were made from, since draws depend on it."""

    header: Header

    @classmethod
    def of(
        cls, shards: str | Sequence[str], weight: float = 1.0, option: str = "data", schemes: Sequence[str] = TRUSTED
    ) -> CacheSource:
        """Reads a header in every folder; raises NoShards, ``WrongCache``, UserError for a weight."""
        found = expand_shards(shards, schemes)
        by_folder = {os.path.dirname(shard): shard for shard in reversed(found)}
        first, *others = reversed(by_folder.values())
        header = read_header(first)
        for other in others:
            check_same(read_header(other), header, other)
        return cls(header.source, found, read_weight(weight, f"{option}.weight"), header)

    def read(self, shard: str) -> Iterator[Record | Rejected]:
        """A shard without its closing member counts as broken.

        Raises ``WrongCache`` for a shard that was made with other options than the others.
        """
        name, samples, seen = shard_name(shard), 0, Counter[str]()
        closing_entries: dict[str, Any] = {}
        begun = False
        for member in read_members(shard):
            if isinstance(member, Rejected):
                yield member
                if member.is_break:
                    return
            elif not begun:
                check_same(Header.read(member.name, member.content, shard), self.header, shard)
                begun = True
            elif member.name == CLOSING:
                closing_entries = read_closing(member)
            else:
                key, extension = base_plus_ext(member.name)
                found = read_record(key or "", extension or "", member.content, name)
                samples += extension == SAMPLE
                if isinstance(found, Record):
                    found.span = content_span(member)
                seen.update([found.broken.reason] if isinstance(found, Record) and found.broken else [])
                yield found
        if closing_entries.get("samples") != samples:
            yield Rejected(Reason.BROKEN_TAR, f"{shard}: it has no {CLOSING} that fits, so it is incomplete")
            return
        yield from map(Rejected, (Counter(closing_entries["rejects"]) - seen).elements())

    def layout_fingerprint(self) -> str:
        return f"{digest(self.header.written().decode()):016x}"

    def fingerprint(self) -> str:
        return f"{digest(self.header.written().decode(), *map(shard_name, self.shards)):016x}"


def read_header(shard: str) -> Header:
    """Of a shard that is opened only for that; raises ``WrongCache``, also when it cannot be read."""
    with closing(read_members(shard)) as members:  # type: ignore[type-var]
        first = next(members, Member("", b""))
    if isinstance(first, Rejected):
        raise WrongCache(first.detail if first.is_break else f"{shard}: {first.detail}")
    return Header.read(first.name, first.content, shard)


def check_same(found: Header, expected: Header, shard: str) -> None:
    if differences := found.differences(expected):
        raise WrongCache(
            f"{shard} was not made as the shards before it: {'; '.join(differences)}. Keep caches that differ in "
            "folders of their own."
        )


def read_record(key: str, extension: str, content: bytes, shard: str) -> Record | Rejected:
    try:
        if extension.lower() == REJECTED:
            entry = json.loads(content)
            broken = Rejected(str(entry["reason"]))
            return Record(key, shard, number(entry["index"]), b"", (), (), to_size(entry["size"]), [], broken)
        about, _, _ = entries_of(content)
        captions = tuple((str(text), float(chance)) for text, chance in about["captions"])
        if not captions:
            raise ValueError("no caption")
        return Record(key, shard, number(about["index"]), content, captions, measured=to_size(about["size"]))
    except (Rejected, *DAMAGED) as error:
        return Rejected(Reason.BROKEN_MEMBER, f"{key}: {error}")


def content_span(member: Member) -> tuple[int, int]:
    begin = member.span[1] - -(-len(member.content) // BLOCK_BYTES) * BLOCK_BYTES
    return begin, begin + len(member.content)


def read_closing(member: Member) -> dict[str, Any]:
    """Empty if it is damaged."""
    try:
        entries = json.loads(member.content)
        rejects = {str(reason): number(times) for reason, times in entries["rejects"].items()}
        return {"samples": number(entries["samples"]), "rejects": rejects}
    except DAMAGED:
        return {}


def number(value: Any) -> int:
    """A count or an index; raises ValueError for anything else, or more than a shard can hold."""
    if type(value) is not int or not 0 <= value <= MAX_SAMPLES:
        raise ValueError(f"{value} is not a number of samples")
    return value
