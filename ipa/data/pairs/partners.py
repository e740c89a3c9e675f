"""Choose a partner for each record: another record, whose image becomes its reference.

The partner is a pure function of the sample's address and of the index, so ranks, workers, batch size and resume change
nothing. It is read from its shard directly, at its offset.
"""

from __future__ import annotations

import logging
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ipa.data.addresses import Address, digest
from ipa.data.pairs.building import build_index, check_local, in_words, list_jobs
from ipa.data.pairs.index import REMAKE, Index, Place, WrongIndex, key_hash, open_index
from ipa.data.pairs.options import Pairs
from ipa.data.records import Record, Source
from ipa.data.rejects import Reason, Rejected
from ipa.data.shards.names import shard_name, some
from ipa.data.shards.source import ShardSource
from ipa.data.shards.tar import BREAKS
from ipa.errors import UserError

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 64  # of each process
AUTOMATIC_BYTES = 2 << 30  # of shards that are indexed at the start
HALF = 1 << 32


class BrokenPartner(Rejected):
    """The partner is unusable; the sample itself is fine."""

    @classmethod
    def of(cls, reject: Rejected, place: Record | Place) -> BrokenPartner:
        key = place.key if isinstance(place, Record) else f"sample {place.number}"
        return cls(Reason.BROKEN_PARTNER, str(reject), key, place.shard)


@dataclass(frozen=True)
class Partners:
    """``path`` is the index; ``sources`` are those of the order, whose shards may have moved since it was made."""

    path: str
    self_share: float
    sources: Sequence[Source]

    @property
    def index(self) -> Index:
        return open_index(self.path)

    @cached_property
    def shards(self) -> Mapping[tuple[str, str], tuple[Source, str]]:
        return {(source.name, shard_name(path)): (source, path) for source in self.sources for path in source.shards}

    def choose(self, record: Record, address: Address) -> Place | None:
        """Where the partner is; None for a self-pair.

        ``address`` is that of a broken sample where the record replaces it, so another record makes another choice.
        """
        number = digest("partner", *vars(address).values(), record.source, record.shard, record.index)
        if number % HALF < self.self_share * HALF:
            return None
        row = self.index.row(record.source, record.shard, record.index, record.key)
        partner = self.index.partner(row, number // HALF)
        return None if partner == row else self.index.place(partner)

    def lend(self, record: Record, address: Address) -> Record:
        """The record whose reference the sample shows, itself for a self-pair; raises ``BrokenPartner``."""
        place = self.choose(record, address)
        return record if place is None else self.read(place)

    def read(self, place: Place) -> Record:
        """Of pictures. Raises ``WrongIndex`` if another sample is there than when the index was made."""
        source, path = self.shards[place.source, place.shard]
        assert isinstance(source, ShardSource)
        data = self.part(place, 0, place.length)
        try:
            record = source.read_at(path, place.number, data)
        except BREAKS:
            raise self.changed(place) from None
        except Rejected as reject:
            raise BrokenPartner.of(reject, place) from None
        if key_hash(record.key) != place.key:
            raise self.changed(place)
        return record

    def part(self, place: Place, begin: int, length: int) -> bytes:
        """``length`` bytes of a sample from its byte ``begin`` on."""
        _, path = self.shards[place.source, place.shard]
        if not place.length:
            raise BrokenPartner.of(Rejected("its picture could not be decoded"), place)
        try:
            data = os.pread(opened(path).number, length, place.offset + begin)
        except OSError as error:
            raise BrokenPartner.of(Rejected(f"{path}: {error}"), place) from None
        if len(data) < length:
            raise self.changed(place)
        return data

    def changed(self, place: Place) -> WrongIndex:
        return WrongIndex(f"{place.shard} has changed since {self.path} was made: {REMAKE}")

    def fingerprint(self) -> str:
        return f"{digest(self.index.fingerprint(), repr(self.self_share)):016x}"


class OpenFile:
    """A file that is closed when nobody refers to it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def opened(path: str) -> OpenFile:
    """A process that was forked shares these files; ``pread`` moves no position."""
    return OpenFile(path)


def open_partners(pairs: Pairs, sources: Sequence[Source]) -> Partners | None:
    """None without ``by``. Checks the index, or makes it if the shards are few; raises UserError."""
    if not pairs.by:
        return None
    for source in sources:
        check_local(source.shards)
    path = pairs.index or str(automatic_index(pairs, sources))
    index = open_index(os.path.abspath(os.path.expanduser(path)))
    check_options(index, pairs)
    check_shards(index, sources)
    for line in in_words(index.about):
        log.info(line)
    return Partners(index.path, pairs.self_share, sources)


def automatic_index(pairs: Pairs, sources: Sequence[Source]) -> Path:
    """The index of few local shards, in the user's cache; its name changes with everything that it depends on."""
    if not all(isinstance(source, ShardSource) for source in sources):
        raise UserError(
            "data.pairs of a feature cache needs an index, made from the pictures with `python -m ipa.tools.pair "
            f"data.train=PICTURES cache=CACHE {pairs} out=FILE`: give data.pairs.index=FILE"
        )
    shards = [shard for source in sources for shard in source.shards]
    stats = [os.stat(shard) for shard in shards]
    if (size := sum(stat.st_size for stat in stats)) > AUTOMATIC_BYTES:
        raise UserError(
            f"the shards have {size / 1e9:,.1f} GB, and an index is made at the start only for up to "
            f"{AUTOMATIC_BYTES / 1e9:.1f} GB: `python -m ipa.tools.pair … {pairs} out=FILE` makes it once, "
            "data.pairs.index=FILE uses it"
        )
    parts = [f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats] + [os.path.abspath(shard) for shard in shards]
    layouts = [part for source in sources for part in (source.name, source.layout_fingerprint())]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ipa" / "pairs"
    path = cache / f"{digest(str(pairs), *layouts, *parts):016x}.safetensors"
    if not path.exists():  # ranks and the jobs of a sweep may each make it at the same time
        with tempfile.TemporaryDirectory() as folder:
            build_index(list_jobs(sources), pairs, path, workers=1, parts_in=Path(folder))
    return path


def check_options(index: Index, pairs: Pairs) -> None:
    made = Pairs(tuple(index.about["by"]), index.about["differ"])
    if (made.by, made.differ) != (pairs.by, pairs.differ):
        raise WrongIndex(f"{index.path} was made with {made}, not {pairs}: give data.pairs the same, or {REMAKE}")


def check_shards(index: Index, sources: Sequence[Source]) -> None:
    """Raises ``WrongIndex`` that names the shards that differ."""
    kind = "pictures" if isinstance(sources[0], ShardSource) else "features"
    if index.about["of"] != kind:
        raise WrongIndex(f"{index.path} is the index of {index.about['of']}, and data.train has {kind}; {REMAKE}")
    known = {source["name"]: source for source in index.about["sources"]}
    if [source.name for source in sources] != list(known):
        raise WrongIndex(f"{index.path} is of the sources {', '.join(known)}, not {', '.join(s.name for s in sources)}")
    for source in sources:
        if faults := differences(known[source.name], source):
            raise WrongIndex(f"{index.path} was made from other shards of {source.name}: {'; '.join(faults)}; {REMAKE}")


def differences(known: Mapping[str, Any], source: Source) -> list[str]:
    made = {name: size for name, size, _ in known["shards"]}
    now = {shard_name(shard): os.path.getsize(shard) for shard in source.shards}
    named = {
        "new": [name for name in now if name not in made],
        "missing": [name for name in made if name not in now],
        "of another size": [name for name in now if made.get(name, now[name]) != now[name]],
    }
    faults = [f"{what}: {some(names)}" for what, names in named.items() if names]
    if not faults and known["layout"] != source.layout_fingerprint():
        faults = ["data.captions, filters, image, reference or masks were others"]
    return faults
