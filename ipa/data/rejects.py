"""Samples that cannot be used: skipped and counted by reason, never repaired silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ipa.errors import UserError
from ipa.files import printable

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

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.reason, self.detail)))

    @property
    def example(self) -> Example:
        return printable(" of ".join(filter(None, (self.key, self.shard)))), self.detail


def count_reasons(rejects: Iterable[Rejected]) -> Counter[str]:
    return Counter(reject.reason for reject in rejects)


def examples_of(rejects: Iterable[Rejected]) -> Examples:
    found: Examples = {}
    for reject in rejects:
        add_examples(found, {reject.reason: [reject.example]})
    return found


def add_examples(known: Examples, more: Examples) -> list[str]:
    """Extend ``known`` up to ``MAX_EXAMPLES`` of each reason; returns the reasons that are new."""
    new = [reason for reason in more if reason not in known]
    for reason, examples in more.items():
        known[reason] = (known.get(reason, []) + examples)[:MAX_EXAMPLES]
    return new


def describe_rejects(counts: Mapping[str, int], examples: Examples) -> list[str]:
    """A line for each reason, the most frequent first: its count and the first samples."""
    return [
        f"{count:,} × {reason}: {in_detail(examples.get(reason, []))}".removesuffix(": ")
        for reason, count in sorted(counts.items(), key=lambda pair: -pair[1])
    ]


def in_detail(examples: Sequence[Example]) -> str:
    """``000012 of 00000.tar, 000031 of 00000.tar (SVG is not read: convert it to PNG)``"""
    places: dict[str, list[str]] = {}
    for place, detail in examples:
        places.setdefault(detail, []).extend([place] if place else [])
    parts = [(", ".join(found), detail) for detail, found in places.items()]
    return "; ".join(f"{found} ({detail})" if found and detail else found or detail for found, detail in parts)


def in_words(rejects: Sequence[Rejected]) -> str:
    return "; ".join(describe_rejects(count_reasons(rejects), examples_of(rejects)))


class NoGoodSamples(UserError):
    """A whole pass over the shards gave no usable sample."""


def no_good_samples(rejects: Iterable[Rejected], shards: int, names: Iterable[str]) -> NoGoodSamples:
    """``names`` are those of the sources: train, val, or entries of ``data.known``."""
    counts = in_words(list(rejects)) or "they are empty"
    return NoGoodSamples(
        f"data.{', '.join(names)}: no usable sample in a whole pass over {shards} shards ({counts}). Expected "
        "img2dataset's layout: a picture and its caption under one key per sample, adjacent in the archive. Check "
        "data.captions and data.filters, and list a shard: `tar tf`."
    )
