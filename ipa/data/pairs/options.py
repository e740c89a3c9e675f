"""The options ``data.pairs`` (docs/pairs.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ipa.data.shards.fields import ENTRY, as_list
from ipa.data.shards.strip import Strip
from ipa.errors import UserError

OPTIONS = ("by", "differ", "self", "strip", "index")
UNPAIRED = {"by": None, "differ": None, "index": None}
WAYS = "give an entry of the metadata (style), or several from the finest to the coarsest ([character, franchise])"


@dataclass(frozen=True)
class Pairs:
    """``by`` has the entries of the metadata that make groups, the finest first; partners differ in entry ``differ``.

    ``self_share`` is the share of samples that are their own reference, ``index`` the file of the pairing index.
    """

    by: tuple[str, ...] = ()
    differ: str | None = None
    self_share: float = 0.0
    strip: Strip = field(default_factory=Strip)
    index: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Pairs:
        """From YAML; raises UserError."""
        if not isinstance(given or {}, Mapping):
            raise UserError(f"data.pairs={given}: give a mapping of {', '.join(OPTIONS)}")
        values = dict(given or {})
        if unknown := [str(name) for name in values if name not in OPTIONS]:
            raise UserError(f"data.pairs has no {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
        by = read_names(values.get("by"), "data.pairs.by")
        differ = read_names(values.get("differ"), "data.pairs.differ")
        share, index = values.get("self"), values.get("index")
        if len(differ) > 1 or set(differ) & set(by):
            raise UserError(f"data.pairs.differ={values['differ']}: give one entry of the metadata that is not in by")
        if not by and (differ or index):
            raise UserError(f"data.pairs.{'differ' if differ else 'index'} needs data.pairs.by: {WAYS}")
        if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
            raise UserError(f"data.pairs.self={share}: give a share of the samples from 0 to 1")
        strip = Strip.of(values.get("strip"))
        return cls(by, differ[0] if differ else None, float(share or 0), strip, None if index is None else str(index))

    @property
    def columns(self) -> tuple[str, ...]:
        """Entries of the metadata that an index needs: the groups, then what partners differ in."""
        return (*self.by, *([self.differ] if self.differ else []))

    def __str__(self) -> str:
        return f"by={','.join(self.by)}{f' differ={self.differ}' if self.differ else ''}"


def read_names(given: Any, option: str) -> tuple[str, ...]:
    """``style`` and ``json.style`` are the same entry."""
    names = as_list(given)
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{option}={given}: {WAYS}")
    read = tuple(name.strip().removeprefix(ENTRY) for name in names)
    if not all(read) or len(set(read)) < len(read):
        raise UserError(f"{option}={given}: {WAYS}, each once")
    return read
