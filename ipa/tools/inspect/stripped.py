"""What ``data.pairs.strip`` takes out of the captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ipa.data.datamodule import ShardDataModule
from ipa.data.records import Record
from ipa.data.shards.fields import Fields
from ipa.data.shards.source import read_shard
from ipa.data.shards.strip import Strip

MAX_TERMS, MAX_EXAMPLES = 12, 4


@dataclass
class Stripped:
    """Captions that were seen, changed and emptied; how often each term was removed; the first changes."""

    captions: int = 0
    changed: int = 0
    empty: int = 0
    terms: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, before: str, after: str, terms: list[str]) -> None:
        self.captions += 1
        self.changed += bool(terms)
        self.empty += bool(terms) and not after
        self.terms.update(term.lower() for term in terms)
        if terms and len(self.examples) < MAX_EXAMPLES:
            self.examples.append((before, after))

    def describe(self) -> list[str]:
        most = ", ".join(f"{term} ({times:,})" for term, times in self.terms.most_common(MAX_TERMS))
        return [
            f"data.pairs.strip changed {self.changed:,} of {self.captions:,} captions; {self.empty:,} are empty now",
            *([f"    removed: {most}"] if most else []),
            *(f"    {before!r} → {after!r}" for before, after in self.examples),
        ]


@dataclass(frozen=True)
class CountingStrip(Strip):
    stripped: Stripped = field(default_factory=Stripped, compare=False)

    def apply(self, text: str, fields: Fields) -> tuple[str, list[str]]:
        after, terms = super().apply(text, fields)
        self.stripped.add(text, after, terms)
        return after, terms


def describe_stripped(data: ShardDataModule, samples: int | None) -> list[str]:
    """Of the first ``samples`` in file order; nothing if nothing is stripped."""
    sources: Any = data.train_order.sources
    strip = sources[0].layout.strip
    if not strip.parts:
        return []
    counting = CountingStrip(strip.terms, strip.names)
    for _ in islice(read_all(sources, counting), samples):
        pass
    return counting.stripped.describe()


def read_all(sources: Any, strip: Strip) -> Iterator[Record]:
    for source in sources:
        layout = replace(source.layout, strip=strip)
        for shard in source.shards:
            yield from (found for found in read_shard(shard, layout) if isinstance(found, Record))
