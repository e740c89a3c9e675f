"""Where the captions of a folder are: text files, a table, or nowhere; found out unless it is said."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from ipa.data.rejects import EMPTY_CAPTION, NO_CAPTION, NOT_UTF8
from ipa.errors import UserError
from ipa.tools.packing.folders import Folder, ending, examples, same, stem
from ipa.tools.packing.tables import TABLES, Columns, Entry, read_entries

TEXT_FILES, NONE = "txt", "none"
WAYS = (
    "Captions are read from .txt files of the pictures' names, or from a table with a row for each picture: JSON "
    "lines, CSV or parquet, named metadata in any folder or otherwise at the top."
)
READERS = 32  # small files on a network are read by many at once
SILENT_S = 2  # what is done sooner needs no bar

Found = dict[str, Entry | str]  # picture → what is said of it, or the reason why it is left out


class Captions(Protocol):
    """A source of captions."""

    def read(self, pictures: Sequence[str]) -> tuple[Found, list[str]]:
        """What is said of each picture (those without are missing), and lines that tell of it."""
        ...


class NoCaptions:
    def read(self, pictures: Sequence[str]) -> tuple[Found, list[str]]:
        return {}, ["captions: none"]


@dataclass(frozen=True)
class TextFiles:
    """Picture → text file beside it."""

    folder: Folder
    texts: Mapping[str, str]

    @classmethod
    def beside(cls, folder: Folder) -> TextFiles:
        texts = {same(stem(name)): name for name in folder.files if ending(name) == "txt"}
        found = {name: texts.get(same(stem(name))) for name in folder.pictures}
        return cls(folder, {name: text for name, text in found.items() if text})

    def read(self, pictures: Sequence[str]) -> tuple[Found, list[str]]:
        with ThreadPoolExecutor(READERS) as pool:
            read = pool.map(self.read_one, self.texts.values())
            shown = tqdm(read, desc="captions", total=len(self.texts), unit=" files", delay=SILENT_S)
            said = dict(zip(self.texts, shown, strict=True))
        return said, [f"captions: .txt files, beside {len(said):,} of {len(pictures):,} pictures"]

    def read_one(self, text: str) -> Entry | str:
        try:
            caption = self.folder.file(text).read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            return NOT_UTF8
        return Entry((caption,)) if caption else EMPTY_CAPTION


@dataclass(frozen=True)
class Tables:
    """Tables of one name: file → where its paths start, as a name in the folder."""

    tables: Mapping[Path, str]
    columns: Columns
    folder: Folder

    def read(self, pictures: Sequence[str]) -> tuple[Found, list[str]]:
        names = {same(name): name for name in pictures}
        said: Found = {}
        lost: list[str] = []
        for table, start in self.tables.items():
            for path, entry in read_entries(table, self.columns).items():
                name = names.get(same(self.name_of(path, start)))
                if name is None:
                    lost.append(path)
                elif entry.captions:
                    before = said.get(name)
                    said[name] = before.merged(entry.captions) if isinstance(before, Entry) else entry
                else:
                    said.setdefault(name, NO_CAPTION)
        if not said:
            raise UserError(
                f"{self.label} names none of the pictures: it says {examples(lost)}, there are {examples(pictures)}. "
                "Paths start in the folder of the table."
            )
        return said, self.tell(said, lost, len(pictures))

    @property
    def label(self) -> str:
        first, *more = self.tables
        return f"{first} and {len(more)} more of this name" if more else str(first)

    def name_of(self, path: str, start: str) -> str:
        """The path as a name in the folder; one that starts at the root may lead there."""
        path = path.strip().replace("\\", "/")
        if path.startswith("/"):
            return path.removeprefix(f"{self.folder.path.absolute()}/")
        return posixpath.normpath(posixpath.join(start, path))

    def tell(self, said: Found, lost: Sequence[str], pictures: int) -> list[str]:
        entries = [entry for entry in said.values() if isinstance(entry, Entry)]
        names = " and ".join(self.columns.fitting(next(iter(self.tables))))
        lines = [f"captions: {self.label}, columns {names}, for {len(entries):,} of {pictures:,} pictures"]
        others = dict.fromkeys(name for entry in entries for name in entry.others)
        if others:
            lines.append(f"further columns, for filters: {', '.join(others)}")
        several = sum(len(entry.captions) > 1 for entry in entries)
        if several:
            lines.append(f"several captions for {several:,} pictures; KEY.txt has the first, json.captions all")
        if lost:
            lines.append(f"rows without a picture: {examples(lost)}")
        return lines


def find_captions(folder: Folder, wanted: str | None, columns: Columns, may_lack: bool) -> Captions:
    """The source that is ``wanted`` (txt, none, or a table), or the only one that there is.

    Raises UserError where there are several, or none unless pictures ``may_lack`` captions.
    """
    sources: dict[str, Captions] = {}
    texts = TextFiles.beside(folder)
    if texts.texts:
        sources[TEXT_FILES] = texts
    sources |= {label: Tables(tables, columns, folder) for label, tables in tables_in(folder, columns).items()}
    if wanted is None and may_lack and not sources:
        wanted = NONE
    if wanted is None:
        if len(sources) != 1:
            raise UserError(unclear(folder, list(sources)))
        return next(iter(sources.values()))
    if wanted == NONE:
        return NoCaptions()
    if wanted == TEXT_FILES and wanted not in sources:
        raise UserError(f"captions=txt: no picture in {folder.path} has a .txt file of its name beside it")
    return sources.get(wanted) or table_at(wanted, columns, folder, list(sources))


def tables_in(folder: Folder, columns: Columns) -> dict[str, dict[Path, str]]:
    """File name → tables of that name."""
    found: dict[str, dict[Path, str]] = {}
    for name in folder.files:
        start, file = posixpath.split(name)
        is_metadata = file in (f"metadata{ending}" for ending in TABLES)
        if is_metadata or (not start and file.endswith(TABLES) and columns.might_fit(folder.file(name))):
            found.setdefault(file, {})[folder.file(name)] = start
    return found


def table_at(wanted: str, columns: Columns, folder: Folder, sources: Sequence[str]) -> Tables:
    """A table that was named, in the folder or elsewhere; paths in one from elsewhere start in the folder."""
    there = ", ".join(sources) or "none that can be told by their names"
    if not wanted.lower().endswith(TABLES):
        raise UserError(
            f"captions={wanted}: neither txt, nor none, nor a table ({', '.join(TABLES)}). The folder has {there}"
        )
    if wanted in folder.files:
        return Tables({folder.file(wanted): posixpath.dirname(wanted)}, columns, folder)
    if not Path(wanted).is_file():
        raise UserError(f"captions={wanted}: no such file, neither here nor in {folder.path}. The folder has {there}")
    inside = Path(wanted).resolve().is_relative_to(folder.path.resolve())
    start = Path(wanted).resolve().relative_to(folder.path.resolve()).parent.as_posix() if inside else ""
    return Tables({Path(wanted): start}, columns, folder)


def unclear(folder: Folder, sources: Sequence[str]) -> str:
    if sources:
        options = " or ".join(f"captions={source}" for source in sources)
        return f"{folder.path} has captions in {len(sources)} places, {', '.join(sources)}: give {options}"
    tables = [name for name in folder.files if name.lower().endswith(TABLES)]
    seen = (
        f" Tables there whose columns are not told by their names: {examples(tables)}; name one with captions=FILE,"
        " and its columns with path_column= and caption_column=."
        if tables
        else ""
    )
    return f"{folder.path} has no captions. {WAYS}{seen} missing_caption=empty packs pictures without any."
