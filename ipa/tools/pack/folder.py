"""The files of a folder, and the captions of its pictures from text files or from a table with a row per picture."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm.contrib.concurrent import thread_map

from ipa.data.rejects import Rejected
from ipa.data.shards.fields import is_unicode
from ipa.data.shards.names import some
from ipa.errors import UserError
from ipa.files import PICTURE_EXTENSIONS, is_picture, read_text

USUAL_COLUMNS = {"path_column": ("file_name", "path", "image"), "caption_column": ("text", "caption", "prompt")}
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
READING_THREADS = 32  # small files on network storage
SHOW_PROGRESS_AFTER_S = 2

Stamp = tuple[int, int]  # size in bytes and modification time in ns, which tell whether a file has changed
NOTHING = (-1, 0)  # the stamp of a link whose file does not exist
Files = dict[str, Stamp]  # name (relative path with /) → stamp, sorted
Row = dict[str, Any]
Entries = dict[str, tuple[tuple[str, ...], Row]]  # picture → its captions, and the other columns of its first row


def list_files(path: str, option: str, skip: str | None = None) -> Files:
    """All files below a folder except ``skip``; raises UserError, which names the ``option``, without a picture."""
    if not Path(path).is_dir():
        raise UserError(f"{option}={path}: no such folder")
    files = dict(sorted(walk(path, (os.path.realpath(path), os.path.realpath(skip or path)))))
    if not pictures_in(files):
        raise UserError(f"{option}={path} has no pictures ({', '.join(PICTURE_EXTENSIONS)}); shards need no packing")
    return files


def walk(folder: str, closed: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, Stamp]]:
    """Regular files and dangling links, without a leading dot; links to folders outside of ``closed`` are followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_file():
                yield prefix + entry.name, (entry.stat().st_size, entry.stat().st_mtime_ns)
            elif entry.is_dir() and (real := os.path.realpath(entry)) not in closed:
                yield from walk(entry.path, (*closed, real), f"{prefix}{entry.name}/")
            elif entry.is_symlink() and not os.path.exists(entry.path):
                yield prefix + entry.name, NOTHING


def pictures_in(files: Files) -> list[str]:
    return [name for name, stamp in files.items() if is_picture(name) and stamp != NOTHING]


def stem(name: str) -> str:
    return normal(name.removesuffix(PurePosixPath(name).suffix))


def normal(name: str) -> str:
    """In Unicode's composed form: file systems and tables write an é in one of two ways."""
    return unicodedata.normalize("NFC", name)


def unused(files: Files) -> list[Rejected]:
    """Files that are neither pictures nor text."""
    known = (*PICTURE_EXTENSIONS, *TABLES, ".txt")
    links = [Rejected("link to nothing", key=name) for name, stamp in files.items() if stamp == NOTHING]
    return links + [Rejected("not a picture", key=name) for name in files if not name.lower().endswith(known)]


def read_captions(files: Files, options: Any) -> tuple[Entries, str]:
    """The pictures with usable captions, and a line about their source; raises UserError for none or several."""
    stems = {stem(name): name for name in files if name.lower().endswith(".txt")}
    texts = {name: stems[stem(name)] for name in pictures_in(files) if stem(name) in stems}
    tables = find_tables(files, options)
    sources = [*(["txt"] if texts else []), *tables]
    wanted = options.captions or (sources[0] if len(sources) == 1 else None)
    if wanted == "none" or (not sources and options.missing_caption == "empty"):
        return {}, "captions: none"
    if wanted not in sources:
        raise UserError(
            f"captions={wanted}: {options.folder} has {len(sources)} sources of captions ({', '.join(sources)}). Give "
            f"txt, none, or a table ({', '.join(TABLES)}). missing_caption=empty packs pictures without captions"
        )
    if wanted in tables:
        return read_tables(files, tables[wanted], options)
    paths = [Path(options.folder, text) for text in texts.values()]
    read = thread_map(read_caption, paths, max_workers=READING_THREADS, desc="captions", delay=SHOW_PROGRESS_AFTER_S)
    found = {name: (captions, Row()) for name, text in zip(texts, read, strict=True) if (captions := usable(text))}
    refused = [str(error) for error in read if isinstance(error, UserError)]
    return found, "captions: .txt files" + (f"; {len(refused)} are no text: {refused[0]}" if refused else "")


def find_tables(files: Files, options: Any) -> dict[str, dict[Path, str]]:
    """Name → tables of that name, and where their paths start: ``metadata.*`` anywhere, at the top, or as given."""
    tables: dict[str, dict[Path, str]] = {}
    for given in (Path(options.captions or ""), Path(options.folder, options.captions or "")):
        if given.is_file():
            start = os.path.relpath(given.parent, options.folder)
            tables[options.captions] = {given: "" if start.startswith("..") else start}
    for name in files:
        start, file = posixpath.split(name)
        if name.lower().endswith(TABLES) and (not start or stem(file) == "metadata"):
            tables.setdefault(file, {})[Path(options.folder, name)] = start
    return tables


def read_caption(path: Path) -> str | UserError:
    try:
        return read_text(path)
    except UserError as error:
        return error


def read_tables(files: Files, tables: Mapping[Path, str], options: Any) -> tuple[Entries, str]:
    pictures, entries, unknown = {normal(name): name for name in pictures_in(files)}, Entries(), list[str]()
    for table, start in tables.items():
        for path, captions, columns in read_rows(table, options):
            inside = path.strip().replace("\\", "/").removeprefix(f"{os.path.abspath(options.folder)}/")
            name = pictures.get(normal(posixpath.normpath(posixpath.join(start, inside))))
            if name is None:
                unknown.append(path)
            elif captions:
                before, first = entries.get(name, ((), columns))
                entries[name] = tuple(dict.fromkeys(before + captions)), first
    about = f"captions: {', '.join(map(str, tables))}"
    if not entries:
        raise UserError(
            f"{about}: no row names a picture of the folder; paths: {some(unknown)}; pictures: {some(list(pictures))}"
        )
    return entries, about + (f"; {len(unknown):,} rows without a picture: {some(unknown)}" if unknown else "")


def read_rows(table: Path, options: Any) -> Iterator[tuple[str, tuple[str, ...], Row]]:
    """Path, captions and other columns of every row; whatever a reader raises becomes a UserError."""
    number, columns = 0, list[str]()
    try:
        for number, row in enumerate(rows_of(table), 1):  # noqa: B007
            if not isinstance(row, dict):
                raise UserError("a row is not an object of names and values")
            columns = columns or [choose(row, option, options[option]) for option in USUAL_COLUMNS]
            path, captions = (row.pop(column, None) for column in columns)
            yield str(path), usable(captions), row
    except ImportError as error:
        raise UserError(f"{table}: parquet needs pyarrow. Install it (pip install pyarrow), or save as CSV") from error
    except Exception as error:  # not UTF-8, and what csv, json and pyarrow raise
        raise UserError(f"{table} cannot be read after row {number}: {error}") from error


def usable(values: Any) -> tuple[str, ...]:
    """A caption or a list of them, without what is blank, no text, or not UTF-8."""
    texts = [text.strip() for text in (values if isinstance(values, list) else [values]) if isinstance(text, str)]
    return tuple(text for text in texts if text and is_unicode(text))


def choose(names: Iterable[str], option: str, given: str | None) -> str:
    """The column that is ``given``, or else the one with a usual name."""
    found = [name for name in names if (name == given if given else name.lower() in USUAL_COLUMNS[option])]
    if len(found) != 1:
        raise UserError(f"give {option}={given or ''}, one of its columns {', '.join(names)}")
    return found[0]


def rows_of(table: Path) -> Iterator[Row]:
    if table.suffix.lower() == ".parquet":
        yield from import_module("pyarrow.parquet").read_table(table).to_pylist()
        return
    lines = io.StringIO(read_text(table), newline="").readlines()
    if table.suffix.lower() == ".jsonl":
        yield from map(json.loads, filter(str.strip, lines))
        return
    delimiter = max(",;|\t", key="".join(lines[:1]).count)  # whichever the header has most of
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    for row in reader:
        if len(row) != len(reader.fieldnames or []):  # a value without a column, or a column named twice
            raise UserError(f"line {reader.line_num} does not fit the columns {', '.join(reader.fieldnames or [])}")
        yield row
