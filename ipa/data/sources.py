"""A source: shards that are read alike, with a name and a weight in the mix.

    laion = Source.of("laion", shards="laion/{00000..00999}.tar", weight=2, captions=["json.recaption", "txt"],
                      filters={"small": {"key": "short_side_px", "min": 512}})

The values are those of a file in conf/source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ipa.data.addresses import digest
from ipa.data.captions import Captions, is_extension, is_weight
from ipa.data.filters import as_list, read_filters
from ipa.data.records import Layout, Record, read_shard
from ipa.data.rejects import Rejected
from ipa.data.shards import TRUSTED, expand_shards, shard_name
from ipa.errors import UserError

OPTIONS = ("shards", "weight", "captions", "reference", "filters")


@dataclass(frozen=True)
class Source:
    """``shards`` are single archives. ``weight`` is this source's share of the samples, relative to the others'."""

    name: str
    shards: list[str]
    weight: float = 1.0
    layout: Layout = field(default_factory=Layout)

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
    ) -> Source:
        """From YAML: see ``expand_shards``, ``captions`` and ``filters``; ``reference``: extensions of other pictures.

        Raises NoShards or ValueError, whose messages name what is below ``option``. No shard is opened.
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
        """The samples of one of the shards, in file order."""
        return read_shard(shard, self.layout)

    def fingerprint(self) -> str:
        """Of all that decides which records there are and what they hold; not of the folders, so that data may move."""
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
        raise UserError(
            f"{option}={weight}: give a number above 0; leave a source out of data.sources to do without it"
        )
    return float(weight)
