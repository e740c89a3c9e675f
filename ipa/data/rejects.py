"""Samples that cannot be used: skipped and counted by reason, never repaired silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ipa.errors import UserError
from ipa.files import printable


class Reason:
    """Why a sample is rejected; filters add reasons with their own names."""

    BROKEN_TAR = "broken tar"
    NO_KEY = "member without a key"
    NO_PICTURE = "no picture"
    BROKEN_PICTURE = "broken picture"
    TOO_MANY_PIXELS = "too many pixels"
    NO_CAPTION = "no caption"
    EMPTY_CAPTION = "empty caption"
    NOT_UTF8 = "caption is not UTF-8"
    NO_REFERENCE = "no reference"
    BROKEN_PARTNER = "broken partner"  # the sample whose image is the reference of a pair
    NO_MASK = "no mask"
    WRONG_MASK = "mask of another size"
    BROKEN_METADATA = "broken metadata"
    DUPLICATE_KEY = "duplicate key"
    UNSAFE_MEMBER = "unsafe member"  # a link, a device, a path outside the folder, or a reserved name
    TOO_LARGE = "too large a member"
    BROKEN_MEMBER = "broken cached sample"
    OTHER_BUCKET = "cached for another aspect-ratio bucket"


MAX_EXAMPLES = 3  # of each reason

Example = tuple[str, str]  # where a rejected sample is, and what is wrong with it
Examples = dict[str, list[Example]]  # reason → the first samples


class Rejected(Exception):
    """A sample, or the rest of a shard, cannot be used: ``reason`` is counted, the rest is for the user."""

    def __init__(self, reason: str, detail: str = "", key: str = "", shard: str = "") -> None:
        super().__init__(reason, detail, key, shard)
        self.reason, self.detail, self.key, self.shard = reason, detail, key, shard

    def at(self, key: str = "", shard: str = "") -> Rejected:
        """With its place; without a traceback, whose frames would keep the sample in memory."""
        return Rejected(self.reason, self.detail, self.key or key, self.shard or shard)

    @property
    def is_break(self) -> bool:
        """Whether the rest of the shard cannot be read."""
        return self.reason == Reason.BROKEN_TAR

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.reason, self.detail)))

    @property
    def example(self) -> Example:
        return printable(" of ".join(filter(None, (self.key, self.shard)))), self.detail


@dataclass
class Tally:
    """How many samples were rejected for each reason, and the first ``MAX_EXAMPLES`` of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: Examples = field(default_factory=dict)

    @classmethod
    def of(cls, rejects: Iterable[Rejected]) -> Tally:
        tally = cls()
        for reject in rejects:
            tally.add({reject.reason: 1}, {reject.reason: [reject.example]})
        return tally

    def add(self, counts: Mapping[str, int], examples: Examples) -> list[str]:
        """Returns the reasons that are new."""
        new = [reason for reason in examples if reason not in self.examples]
        self.counts.update(counts)
        for reason, more in examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + more)[:MAX_EXAMPLES]
        return new

    def lines(self) -> list[str]:
        """One for each reason, the most frequent first: its count and the first samples."""
        return [
            f"{count:,} × {reason}: {in_detail(self.examples.get(reason, []))}".removesuffix(": ")
            for reason, count in self.counts.most_common()
        ]

    def __str__(self) -> str:
        return "; ".join(self.lines())


def in_detail(examples: Sequence[Example]) -> str:
    """``000012 of 00000.tar, 000031 of 00000.tar (SVG is not read: convert it to PNG)``"""
    places: dict[str, list[str]] = {}
    for place, detail in examples:
        places.setdefault(detail, []).extend([place] if place else [])
    parts = [(", ".join(found), detail) for detail, found in places.items()]
    return "; ".join(f"{found} ({detail})" if found and detail else found or detail for found, detail in parts)


class NoGoodSamples(UserError):
    """A whole pass over the shards gave no usable sample."""


def no_good_samples(rejects: Iterable[Rejected], sources: Sequence[Any]) -> NoGoodSamples:
    """The sources are called train, val, or as entries of ``data.known``."""
    names, shards = [source.name for source in sources], sum(len(source.shards) for source in sources)
    counts = str(Tally.of(rejects)) or "they are empty"
    return NoGoodSamples(
        f"data.{', '.join(names)}: no usable sample in a whole pass over {shards} shards ({counts}). Expected "
        "img2dataset's layout: a picture and its caption under one key per sample, adjacent in the archive. Check "
        "data.captions and data.filters, and list a shard: `tar tf`."
    )
