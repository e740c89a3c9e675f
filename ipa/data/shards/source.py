"""A source of captioned pictures: shards → records, as img2dataset or another tool wrote them.

    laion = ShardSource.of("laion", shards="laion/{00000..00999}.tar", weight=2, captions=["json.recaption", "txt"],
                           filters={"small": {"key": "short_side_px", "min": 512}})

The values are those of a file in conf/source. WebDataset's ``group_by_keys`` groups the members into samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from webdataset.tariterators import group_by_keys

from ipa.data.addresses import digest
from ipa.data.records import Record, Source
from ipa.data.rejects import BROKEN_TAR, DUPLICATE_KEY, NO_REFERENCE, Rejected
from ipa.data.shards.fields import Captions, Fields, is_extension, is_weight
from ipa.data.shards.filters import Filter, as_list, read_filters
from ipa.data.shards.names import TRUSTED, expand_shards, shard_name
from ipa.data.shards.tar import read_members
from ipa.errors import UserError

OPTIONS = ("shards", "weight", "captions", "reference", "filters")


@dataclass(frozen=True)
class Layout:
    """Which member or entry of the metadata is the caption, which members are references, what is filtered."""

    captions: Captions = field(default_factory=Captions)
    references: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = ()

    def record(self, key: str, shard: str, index: int, members: Mapping[str, bytes]) -> Record:
        """Members: extension → content. The first fault of picture, caption, reference and filters is raised."""
        fields = Fields(members, self.references)
        picture, captions = fields.picture, self.captions.read(fields)
        references = tuple(members[name] for name in self.references if name in members)
        if self.references and not references:
            raise Rejected(NO_REFERENCE, f"none of {', '.join(self.references)}")
        for each in self.filters:
            each.check(fields, captions[0][0])
        return Record(key, shard, index, picture, captions, references, fields.known_size)

    def try_record(self, key: str, shard: str, index: int, members: Mapping[str, bytes]) -> Record | Rejected:
        try:
            return self.record(key, shard, index, members)
        except Rejected as reject:
            return reject.copy()


@dataclass(frozen=True)
class ShardSource(Source):
    """``shards`` are single archives, ``layout`` is what to read in them."""

    layout: Layout

    @classmethod
    def of(
        cls,
        name: str,
        *,
        shards: str | Sequence[str],
        weight: float = 1.0,
        captions: Any = "txt",
        reference: str | Sequence[str] | None = None,
        filters: Mapping[str, Any] | None = None,
        option: str = "data",
        schemes: Sequence[str] = TRUSTED,
        **unknown: Any,
    ) -> ShardSource:
        """From YAML: see ``expand_shards``, ``captions`` and ``filters``; ``reference``: extensions of other pictures.

        Raises UserError, whose messages name what is below ``option``. No shard is opened.
        """
        if unknown:
            raise UserError(f"{option} has no {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
        layout = Layout(
            Captions.of(captions, f"{option}.captions"),
            read_references(reference, f"{option}.reference"),
            read_filters(filters, f"{option}.filters"),
        )
        found = expand_shards(shards, schemes, f"{option.partition('.')[0]}.schemes")
        return cls(name, found, read_weight(weight, f"{option}.weight"), layout)

    def read(self, shard: str) -> Iterator[Record | Rejected]:
        return read_shard(shard, self.layout)

    def fingerprint(self) -> str:
        return self.identity

    @cached_property
    def identity(self) -> str:
        return f"{digest(repr(self.layout), *map(shard_name, self.shards)):016x}"


def read_references(reference: Any, option: str) -> tuple[str, ...]:
    names = [] if reference is None else as_list(reference)
    if not all(map(is_extension, names)) or len({name.lower() for name in names}) < len(names):
        raise UserError(
            f"{option}={reference}: give the extension of a member (ref.jpg of 0001.ref.jpg), or a list of them"
        )
    return tuple(name.lower() for name in names)


def read_weight(weight: Any, option: str) -> float:
    if not is_weight(weight):
        raise UserError(f"{option}={weight}: give a number above 0; to turn a source off, leave it out of data.sources")
    return float(weight)


def read_shard(shard: str, layout: Layout) -> Iterator[Record | Rejected]:
    """The samples of a shard in file order.

    Of samples with the same key the first counts. The last sample before a break is used if it is complete; if not, it
    is part of the break and not counted separately.
    """
    name, seen, files = shard_name(shard), set[str](), Files(shard)
    held: Record | Rejected | None = None
    for index, members in enumerate(group_by_keys(files, handler=files.skip_double)):
        if held is not None:
            yield held
        key, _ = members.pop("__key__"), members.pop("__url__")
        if files.doubled and key not in seen:
            yield Rejected(DUPLICATE_KEY, key)
        held = Rejected(DUPLICATE_KEY, key) if key in seen else layout.try_record(key, name, index, members)
        seen.add(key)
        yield from files.take_rejects()
    if held is not None and not (files.broken and isinstance(held, Rejected)):
        yield held
    yield from files.take_rejects()
    if files.broken:
        yield files.broken


class Files:
    """The members of a shard as ``group_by_keys`` takes them; rejected ones are set aside, so they split no sample."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.rejects: list[Rejected] = []
        self.broken: Rejected | None = None
        self.doubled = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for member in read_members(self.shard):
            if not isinstance(member, Rejected):
                yield {"fname": member.name, "data": member.content, "__url__": self.shard}
            elif member.reason == BROKEN_TAR:
                self.broken = member
            else:
                self.rejects.append(member)

    def skip_double(self, error: Exception) -> bool:
        """Called for a second member with the same name, which is left out."""
        self.doubled = True
        return True

    def take_rejects(self) -> list[Rejected]:
        taken, self.rejects, self.doubled = self.rejects, [], False
        return taken
