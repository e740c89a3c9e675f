"""The members of one sample: its picture, captions and metadata, each parsed only when it is needed.

docs/data.md has the ways to name captions. Several texts in one entry of the metadata share the key's weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ipa.data.images.opening import Size, picture_size
from ipa.data.records import Mask
from ipa.data.rejects import Reason, Rejected
from ipa.errors import UserError
from ipa.files import PICTURE_EXTENSIONS, PICTURES

METADATA = "json"
ENTRY = f"{METADATA}."  # begins the key of an entry of the metadata: json.NAME
ALPHA = "alpha"  # a picture's own opacity, in place of the extension of a mask
MAX_TEXT_BYTES, MAX_METADATA_BYTES = 1 << 20, 1 << 24
MAX_NAMES_SHOWN = 8
CHOICES = ("first", "random", "weight")
WAYS = "a key (txt, json.NAME), a list of keys, a mapping key: weight, or {keys: …, choice: first | random | weight}"


class Fields:
    """One sample: extension → content. Its picture is the first of ``images`` that is no reference.

    All properties raise ``Rejected``.
    """

    def __init__(
        self, members: Mapping[str, bytes], references: Sequence[str] = (), images: Sequence[str] = ()
    ) -> None:
        self.members, self.references, self.images = members, references, images or PICTURES

    @cached_property
    def picture(self) -> bytes:
        for extension in self.images:
            if extension in self.members and extension not in self.references:
                return self.members[extension]
        raise Rejected(Reason.NO_PICTURE, self.what_there_is)

    def mask(self, name: str, picture: bytes) -> Mask:
        """The mask of a picture of this sample: its opacity if ``name`` is ``ALPHA``, else a member."""
        if name == ALPHA:
            return Mask(picture, is_alpha=True)
        if name not in self.members:
            raise Rejected(Reason.NO_MASK, f"{name} is missing: {self.what_there_is}")
        return Mask(self.members[name], is_alpha=False)

    @property
    def what_there_is(self) -> str:
        """The members, and a hint at how to find a missing one."""
        if "safetensors" in self.members:
            return "it is a sample of a feature cache, which data=cache reads"
        names = [*self.members][:MAX_NAMES_SHOWN]
        if dotted := [name for name in names if name.endswith(PICTURE_EXTENSIONS) and name not in self.references]:
            return f"it has {', '.join(names)}; keys end at the first dot, and data.image={dotted[0]} names this member"
        return f"it has only {', '.join(names)}; members of a sample must be adjacent, as `tar --sort=name` stores them"

    @cached_property
    def size(self) -> Size:
        return picture_size(self.picture)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Empty without a JSON member."""
        try:
            entries = json.loads(self.text(METADATA, MAX_METADATA_BYTES) if METADATA in self.members else "{}")
        except (ValueError, RecursionError) as error:
            raise Rejected(Reason.BROKEN_METADATA, str(error)) from error
        if not isinstance(entries, dict):
            raise Rejected(Reason.BROKEN_METADATA, f"a {type(entries).__name__}, expected an object")
        return entries

    def entry(self, name: str) -> Any:
        """An entry of the metadata; None if it is missing or the metadata are broken. Raises nothing."""
        try:
            return self.metadata.get(name)
        except Rejected:
            return None

    def text(self, extension: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
        """A member's text; may raise UnicodeDecodeError."""
        if len(self.members[extension]) > max_bytes:
            raise Rejected(Reason.TOO_LARGE, f"{extension}: {len(self.members[extension]):,} bytes of text")
        return self.members[extension].decode().removeprefix("\ufeff")  # a byte order mark is no text


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
                rejects.append(reject.at())
                continue
            if self.first:
                return ((texts[0], 1.0),)
            found += [(text, weight / len(texts)) for text in texts]
        if not found:
            raise rejects[0].at()
        total = sum(weight for _, weight in found)
        return tuple((text, weight / total) for text, weight in found)


def weighted(keys: Any, option: str) -> tuple[tuple[str, float], ...]:
    named = [keys] if isinstance(keys, str) else keys
    listed = named if isinstance(named, Sequence) else []
    pairs = list(named.items()) if isinstance(named, Mapping) else [(key, 1) for key in listed]
    bad = [key for key, weight in pairs if not (is_extension(key) or is_entry(key)) or not is_weight(weight)]
    checked = [] if bad else [(key if key.startswith(ENTRY) else key.lower(), float(weight)) for key, weight in pairs]
    if not checked or len(dict(checked)) < len(checked):
        raise UserError(f"{option}={keys}: give {WAYS}; each key once, weights above 0")
    return tuple(checked)


def as_list(given: Any) -> list[Any]:
    """One or several; None is none."""
    if given is None:
        return []
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def is_entry(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(ENTRY) and key != ENTRY


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
        raise Rejected(Reason.NO_CAPTION, fields.what_there_is)
    try:
        return usable([fields.text(key)])
    except UnicodeDecodeError as error:
        raise Rejected(Reason.NOT_UTF8, f"{key}: byte {error.start} is 0x{error.object[error.start]:02x}") from error


def usable(values: Sequence[Any]) -> list[str]:
    texts = [value.strip() for value in values if isinstance(value, str)]
    if not texts:
        raise Rejected(Reason.NO_CAPTION)
    full = [text for text in texts if text]
    if not full:
        raise Rejected(Reason.EMPTY_CAPTION)
    sound = [text for text in full if is_unicode(text)]
    if not sound:
        raise Rejected(Reason.NOT_UTF8, "half of a surrogate pair")
    return sound


def is_unicode(text: str) -> bool:
    """JSON may hold halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
