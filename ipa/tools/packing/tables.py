"""Tables of captions: one row per picture, as JSON lines, CSV or parquet."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ipa.data.shards.fields import is_unicode
from ipa.errors import UserError

PATHS = ("file_name", "path", "image")
CAPTIONS = ("text", "caption", "prompt")
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
TYPED = (".jsonl", ".parquet")  # whose values have types
BLANKS = ("", "nan", "null", "none")
SHOWN = 12

Row = dict[str, Any]


class NoReader(UserError):
    """A library that reads such tables is not installed."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold the path and the caption; found by their usual names where the user names none."""

    path: str | None = None
    caption: str | None = None

    def fitting(self, table: Path) -> tuple[str, str]:
        """The two columns of this table; raises UserError where it is not clear which they are."""
        names = column_names(table)
        path = choose(names, self.path, PATHS, "path_column", table)
        return path, choose(names, self.caption, CAPTIONS, "caption_column", table)

    def might_fit(self, table: Path) -> bool:
        """Whether the table seems to be about pictures and captions; so does one that cannot be looked into."""
        try:
            names = [name.lower() for name in column_names(table)]
        except NoReader:
            return True
        except ValueError:
            return False
        wanted = ((self.path, PATHS), (self.caption, CAPTIONS))
        return all({given.lower()} & set(names) if given else set(known) & set(names) for given, known in wanted)


@dataclass(frozen=True)
class Entry:
    """What a table says of a picture: its captions, the first row's first, and the first row's other columns."""

    captions: tuple[str, ...]
    others: Row = field(default_factory=dict)

    def merged(self, captions: tuple[str, ...]) -> Entry:
        return Entry(tuple(dict.fromkeys(self.captions + captions)), self.others)


def choose(names: Sequence[str], given: str | None, known: Sequence[str], option: str, table: Path) -> str:
    """The column that is ``given``, or else the one with a ``known`` name."""
    there = ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
    if given is not None:
        if given not in names:
            raise UserError(f"{option}={given}: {table} has the columns {there}")
        return given
    found = [name for name in names if name.lower() in known]
    if len(found) != 1:
        what = f"several of {', '.join(known)}" if found else f"none of {', '.join(known)}"
        raise UserError(f"{table} has {what} among its columns {there}. Say {option}=NAME.")
    return found[0]


def read_entries(table: Path, columns: Columns) -> dict[str, Entry]:
    """Path as it is written → entry; rows of one picture become one entry. Rows without a path are left out."""
    path, caption = columns.fitting(table)
    with told(table):
        rows = list(rows_of(table))
    names = [row.pop(path, None) for row in rows]
    captions = [captions_of(row.pop(caption, None)) for row in rows]
    if table.suffix.lower() not in TYPED:
        give_numbers(rows)
    entries: dict[str, Entry] = {}
    for name, said, others in zip(names, captions, rows, strict=True):
        if isinstance(name, str) and name.strip():
            entries[name] = entries[name].merged(said) if name in entries else Entry(said, others)
    return entries


def captions_of(value: Any) -> tuple[str, ...]:
    """A caption, or a list of them; what is no text is none, blank ones neither."""
    values = value if isinstance(value, list) else [value]
    return tuple(text.strip() for text in values if isinstance(text, str) and text.strip() and is_unicode(text))


def column_names(table: Path) -> list[str]:
    """The columns of the first row; raises UserError for a table without rows."""
    with told(table):
        first = next(rows_of(table), None)
    if first is None:
        raise UserError(f"{table} has no rows")
    return list(first)


@contextmanager
def told(table: Path) -> Iterator[None]:
    """Whatever a reader raises becomes a ValueError that names the table."""
    try:
        yield
    except (OSError, NoReader):
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except Exception as error:  # csv, json and pyarrow have their own
        raise UserError(f"{table} cannot be read: {error}") from error


def rows_of(table: Path) -> Iterator[Row]:
    readers: Mapping[str, Callable[[Path], Iterator[Row]]] = {".jsonl": json_rows, ".parquet": parquet_rows}
    return readers.get(table.suffix.lower(), csv_rows)(table)


def json_rows(table: Path) -> Iterator[Row]:
    with table.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"line {number} is no object of names and values")
            yield row


def csv_rows(table: Path) -> Iterator[Row]:
    """A header and lines; the separator is whichever of , ; | and the tab the header has most of."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;|\t", key=header.count))
        names = [name.strip() for name in next(reader, [])]
        if len(set(names)) < len(names):
            raise UserError(f"its header names a column twice: {', '.join(names)}")
        for values in filter(None, reader):
            if len(values) > len(names):
                raise UserError(f"line {reader.line_num} has {len(values)} values for {len(names)} columns")
            yield dict(zip_longest(names, values))


def parquet_rows(table: Path) -> Iterator[Row]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise NoReader(
            f"{table}: parquet needs pyarrow. Install it (pip install pyarrow), or save the table as CSV"
        ) from error
    for batch in parquet.ParquetFile(table).iter_batches():
        yield from batch.to_pylist()


def give_numbers(rows: list[Row]) -> None:
    """Columns that hold only numbers become numbers, as filters need them, and their blanks None; all else is text."""
    for name in rows[0] if rows else ():
        values = ["" if row[name] is None else row[name].strip() for row in rows]
        for kind in (int, float):
            numbers = [as_number(value, kind) for value in values]
            if all(value is not None or text.lower() in BLANKS for value, text in zip(numbers, values, strict=True)):
                for row, number in zip(rows, numbers, strict=True):
                    row[name] = number
                break


def as_number(value: str, kind: type[int] | type[float]) -> float | None:
    """None for what is no number, and for what would not survive being one, as 007."""
    if "_" in value or re.match(r"[+-]?0\d", value):
        return None
    try:
        number = kind(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
