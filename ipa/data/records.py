"""One shard → records: what a sample has, as img2dataset or another tool wrote it, or why it cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Protocol

from ipa.data.captions import Captions
from ipa.data.fields import Fields, picture_size
from ipa.data.filters import Filter
from ipa.data.members import Member, read_members
from ipa.data.rejects import DUPLICATE_KEY, NO_REFERENCE, Rejected
from ipa.data.shards import shard_name


@dataclass
class Record:
    """A sample as it lies in the shard; ``index`` counts the shard's samples, good and bad, from 0.

    ``captions`` have their chances, which sum to 1. ``references`` are other pictures of what the picture shows;
    without any it is its own. ``rejects`` are its unusable neighbours, so that each is counted once. ``broken`` says
    why its picture could not be decoded, once that was tried.
    """

    key: str
    shard: str
    index: int
    picture: bytes
    captions: tuple[tuple[str, float], ...]
    references: tuple[bytes, ...] = ()
    measured: tuple[int, int] | None = None
    rejects: list[Rejected] = field(default_factory=list)
    broken: Rejected | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in px of the upright picture, as far as its header can be read."""
        if self.measured is None and self.picture:
            with suppress(Rejected):
                self.measured = picture_size(self.picture)
        return self.measured

    def caption(self, u: float) -> str:
        """The one that the draw u in [0, 1) falls on."""
        for text, chance in self.captions:
            u -= chance
            if u < 0:
                return text
        return self.captions[-1][0]  # the chances' sum is rounded


class MakesRecords(Protocol):
    """What becomes of a sample's members (extension → content); raises ``Rejected``."""

    def record(self, key: str, shard: str, index: int, members: Mapping[str, bytes]) -> Record: ...


@dataclass(frozen=True)
class Layout:
    """Captioned pictures: which member or entry of the metadata is the caption, which members are references."""

    captions: Captions = field(default_factory=Captions)
    references: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = ()

    def record(self, key: str, shard: str, index: int, members: Mapping[str, bytes]) -> Record:
        """Of several things that are wrong the first in this order counts: picture, caption, reference, filters."""
        fields = Fields(members, self.references)
        picture, captions = fields.picture, self.captions.read(fields)
        references = tuple(members[name] for name in self.references if name in members)
        if self.references and not references:
            raise Rejected(NO_REFERENCE, f"none of {', '.join(self.references)}")
        for each in self.filters:
            each.check(fields, captions[0][0])
        return Record(key, shard, index, picture, captions, references, fields.known_size)


def read_shard(shard: str, layout: MakesRecords) -> Iterator[Record | Rejected]:
    """The samples of a shard in file order.

    Of samples with the same key the first counts. The sample at a break is delivered if it was complete; if not, it is
    part of the break and not counted by itself.
    """
    name, seen = shard_name(shard), set[str]()
    held: Record | Rejected | None = None
    refused: list[Rejected] = []
    groups = groupby(taken(read_members(shard), refused), key=attrgetter("key", "broken"))
    for index, ((key, broken), members) in enumerate(groups):
        if held is not None and not (broken and isinstance(held, Rejected)):
            yield held
        if broken:
            yield from refused
            yield broken
            return
        contents, doubled = collect(members)
        if doubled and key not in seen:
            yield Rejected(DUPLICATE_KEY, key)
        held = Rejected(DUPLICATE_KEY, key) if key in seen else try_record(layout, key, name, index, contents)
        seen.add(key)
        yield from refused
        refused.clear()
    if held is not None:
        yield held
    yield from refused


def taken(members: Iterable[Member], refused: list[Rejected]) -> Iterator[Member]:
    """The members that belong to samples; the reasons of the others are laid aside, as they may lie between these."""
    for member in members:
        if member.refused is None:
            yield member
        else:
            refused.append(member.refused)


def collect(members: Iterable[Member]) -> tuple[dict[str, bytes], bool]:
    """Extension → content of one key, the first of each, and whether one came twice."""
    contents: dict[str, bytes] = {}
    doubled = False
    for member in members:
        doubled |= member.extension in contents
        contents.setdefault(member.extension, member.content)
    return contents, doubled


def try_record(
    layout: MakesRecords, key: str, shard: str, index: int, members: Mapping[str, bytes]
) -> Record | Rejected:
    try:
        return layout.record(key, shard, index, members)
    except Rejected as reject:
        return Rejected(reject.reason, reject.detail)  # the caught one holds the frames, and so the picture, in memory
