"""Terms that are taken out of captions, so that what they name has to come from the image prompt.

"a cat, oil painting, by Van Gogh" becomes "a cat" (docs/pairs.md). A space in a term also matches an underscore. What a
removed term leaves behind goes with it: "by", "in the style of", the rest of "an … of" at the begin of a clause,
articles and prepositions before its end, doubled commas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ipa.data.shards.fields import ENTRY, Fields, as_list
from ipa.errors import UserError, brief
from ipa.files import read_list

Captions = tuple[tuple[str, float], ...]

WAYS = "give files with a term per line, and json.NAME for entries of the metadata"
WORD = re.compile(r"[^\W_]+")
GAP = "\0"  # in place of a removed term, until the text is tidy
TIDY = [
    (re.compile(rf"(^|[,.;:])\s*(?:(?:an?|the)\s+)?{GAP}\s+of\s+", re.IGNORECASE), r"\1 "),
    (re.compile(rf"\b(?:(?:in\s+)?(?:the\s+)?style\s+(?:of|by)|by)\s+{GAP}", re.IGNORECASE), GAP),
    (re.compile(rf"(?:\b(?:an?|the|in|of|as|with|and|from)\s+)+{GAP}(?=\s*(?:[,.;:!?)]|$))", re.IGNORECASE), GAP),
    (re.compile(rf"\(\s*{GAP}\s*\)"), " "),
    (re.compile(rf"\s*{GAP}[\s{GAP}]*"), " "),
    (re.compile(r"\s+(?=[,.;:!?)])"), ""),
    (re.compile(r"([,;:])(?:\s*[,;:])+"), r"\1"),
    (re.compile(r"[,;:]+(?=[.!?])"), ""),
    (re.compile(r"^[\s,.;:!?-]+|[\s,;:-]+$"), ""),
]


@dataclass(frozen=True)
class Strip:
    """``terms`` are removed from every caption, those in the entries ``names`` of a sample's metadata from its own."""

    terms: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Any, option: str = "data.pairs.strip") -> Strip:
        """From YAML; raises UserError, which names the ``option``."""
        entries = as_list(given)
        if not all(isinstance(entry, str) and entry for entry in entries):
            raise UserError(f"{option}={given}: {WAYS}")
        names = tuple(entry.removeprefix(ENTRY) for entry in entries if entry.startswith(ENTRY))
        terms = [term for entry in entries if not entry.startswith(ENTRY) for term in read_terms(entry, option)]
        return cls(tuple(dict.fromkeys(term.lower() for term in terms)), names)

    @property
    def parts(self) -> tuple[str, ...]:
        """Everything that decides what it does; nothing if it does nothing."""
        return (*(f"strip {term}" for term in self.terms), *(f"strip {ENTRY}{name}" for name in self.names))

    @cached_property
    def by_first_word(self) -> Mapping[str, list[str]]:
        """Most captions have none of these words, and need no search."""
        found: dict[str, list[str]] = {}
        for term in self.terms:
            found.setdefault(WORD.findall(term)[0], []).append(term)
        return found

    def captions(self, captions: Captions, fields: Fields) -> Captions:
        values = [fields.entry(name) for name in self.names]
        return tuple((self.apply(text, values)[0], chance) for text, chance in captions)

    def apply(self, text: str, values: Sequence[Any]) -> tuple[str, list[str]]:
        """The caption without the terms, and those that were in it; ``values`` are those of the entries ``names``."""
        words = dict.fromkeys(WORD.findall(text.lower()))
        terms = [term for word in words for term in self.by_first_word.get(word, ())]
        own = [term for value in values for term in (value if isinstance(value, list) else [value])]
        terms += [term for term in own if isinstance(term, str) and WORD.search(term)]
        return remove(text, terms) if terms else (text, [])


def read_terms(path: str, option: str) -> list[str]:
    try:
        terms = read_list(Path(path).expanduser())
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read ({brief(error)}); {WAYS}") from error
    if not terms or not all(WORD.search(term) for term in terms):
        raise UserError(f"{option}: {path} should have a term on each line, with letters in it")
    return terms


def remove(text: str, terms: Iterable[str]) -> tuple[str, list[str]]:
    any_of = pattern(tuple(sorted(set(terms), key=lambda term: (-len(term), term))))
    removed = any_of.findall(text)
    if removed:
        text = any_of.sub(GAP, text)
        for expression, replacement in TIDY:
            text = expression.sub(replacement, text)
    return text, removed


@lru_cache(maxsize=1024)
def pattern(terms: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the terms as whole words, the first that fits."""
    spaced = (r"[\s_]+".join(re.escape(word) for word in re.split(r"[\s_]+", term.strip(" _\t"))) for term in terms)
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(spaced)})(?![^\W_])", re.IGNORECASE)
