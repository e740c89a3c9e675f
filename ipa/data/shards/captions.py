"""Which captions a sample has, and how often each is used.

    captions: txt                               one key: a member's extension, or json.NAME, an entry of the metadata
    captions: [json.recaption, txt]             the first that exists
    captions: {json.recaption: 3, txt: 1}       sampled in each pass, by weight
    captions: {keys: [txt, json.alt], choice: random}       sampled uniformly

An entry of the metadata may be a list of texts; these share the key's weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ipa.data.rejects import EMPTY_CAPTION, NO_CAPTION, NOT_UTF8, Rejected
from ipa.data.shards.fields import ENTRY, METADATA, Fields
from ipa.errors import UserError

CHOICES = ("first", "random", "weight")
WAYS = "a key (txt, json.NAME), a list of keys, a mapping key: weight, or {keys: …, choice: first | random | weight}"


@dataclass(frozen=True)
class Captions:
    """``weights``: key → weight, in order; ``first`` uses only the first usable caption, whatever the weights."""

    weights: tuple[tuple[str, float], ...] = (("txt", 1.0),)
    first: bool = True

    @classmethod
    def of(cls, values: Any, option: str = "data.captions") -> Captions:
        """From YAML; raises UserError, which names the ``option``."""
        keys, choice = values, None
        if isinstance(values, Mapping) and "keys" in values:
            if unknown := set(values) - {"keys", "choice"}:
                raise UserError(f"{option} has no {', '.join(map(str, sorted(unknown)))}: give {WAYS}")
            keys, choice = values["keys"], values.get("choice")
        choice = choice or ("weight" if isinstance(keys, Mapping) else "first")
        if choice not in CHOICES or (choice == "weight") != isinstance(keys, Mapping):
            raise UserError(f"{option}: the choice {choice} does not go with {keys}; give {WAYS}")
        return cls(weighted(keys, option), choice == "first")

    def read(self, fields: Fields) -> tuple[tuple[str, float], ...]:
        """The usable captions and their probabilities; without any raises the ``Rejected`` of the first key."""
        found: list[tuple[str, float]] = []
        rejects: list[Rejected] = []
        for key, weight in self.weights:
            try:
                texts = read_texts(fields, key)
            except Rejected as reject:
                rejects.append(reject.copy())
                continue
            if self.first:
                return ((texts[0], 1.0),)
            found += [(text, weight / len(texts)) for text in texts]
        if not found:
            raise rejects[0].copy()
        total = sum(weight for _, weight in found)
        return tuple((text, weight / total) for text, weight in found)


def weighted(keys: Any, option: str) -> tuple[tuple[str, float], ...]:
    """Keys with their weights, checked."""
    named = [keys] if isinstance(keys, str) else keys
    listed = named if isinstance(named, Sequence) else []
    pairs = list(named.items()) if isinstance(named, Mapping) else [(key, 1) for key in listed]
    bad = [key for key, weight in pairs if not is_key(key) or not is_weight(weight)]
    checked = [] if bad else [(key if key.startswith(ENTRY) else key.lower(), float(weight)) for key, weight in pairs]
    if not checked or len(dict(checked)) < len(checked):
        raise UserError(f"{option}={keys}: give {WAYS}; each key once, weights above 0")
    return tuple(checked)


def is_key(key: Any) -> bool:
    return is_extension(key) or (isinstance(key, str) and key.startswith(ENTRY) and key != ENTRY)


def is_extension(key: Any) -> bool:
    """Whether it can be the part of a member's name after its key and a dot, other than the metadata's."""
    return isinstance(key, str) and key.strip(" ./") == key != METADATA and key != "" and not key.startswith(ENTRY)


def is_weight(weight: Any) -> bool:
    return isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 < weight < math.inf


def read_texts(fields: Fields, key: str) -> list[str]:
    """The usable texts of a key, at least one; raises ``Rejected`` with the reason if there is none."""
    if key.startswith(ENTRY):
        value = fields.metadata.get(key.removeprefix(ENTRY))
        return usable(value if isinstance(value, list) else [value])
    if key not in fields.members:
        raise Rejected(NO_CAPTION)
    try:
        return usable([fields.text(key)])
    except UnicodeDecodeError as error:
        raise Rejected(NOT_UTF8, str(error)) from error


def usable(values: Sequence[Any]) -> list[str]:
    texts = [value.strip() for value in values if isinstance(value, str)]
    if not texts:
        raise Rejected(NO_CAPTION)
    full = [text for text in texts if text]
    if not full:
        raise Rejected(EMPTY_CAPTION)
    sound = [text for text in full if is_unicode(text)]
    if not sound:
        raise Rejected(NOT_UTF8, "half of a surrogate pair")
    return sound


def is_unicode(text: str) -> bool:
    """JSON may hold halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
