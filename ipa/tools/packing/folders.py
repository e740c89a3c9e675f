"""What lies in a folder, by name. Nothing is opened; what starts with a dot is left alone."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ipa.data.shards.fields import PICTURE_MEMBERS
from ipa.data.shards.names import ENDINGS
from ipa.errors import UserError

# pictures that nothing here reads: told, so that they are not overlooked
UNREAD = ("heic", "heif", "jfif", "jp2", "jxl", "svg", "psd", "dng", "cr2", "nef", "arw")
SHOWN = 3


class Stamp(NamedTuple):
    """What changes when a file does."""

    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Folder:
    """All files under ``path``: name (the path from there, written with /) → stamp, sorted by name."""

    path: Path
    files: Mapping[str, Stamp]

    @classmethod
    def read(cls, path: Path, option: str, besides: Path | None = None) -> Folder:
        """``besides`` is a folder in it that does not count; ``option`` is what gave the path.

        Raises UserError if there is no picture.
        """
        if not path.is_dir():
            raise UserError(f"{option}={path}: no such folder")
        left_out = os.path.realpath(besides) if besides else ""
        found = sorted(walk(str(path), (os.path.realpath(path), left_out)))
        folder = cls(path, {name: Stamp(status.st_size, status.st_mtime_ns) for name, status in found})
        if not folder.pictures:
            shards = any(name.endswith(ENDINGS) for name in folder.files)
            hint = f". It holds shards: data.train={path} trains on them as they are" if shards else ""
            raise UserError(
                f"{option}={path} holds no pictures, files that end with {', '.join(PICTURE_MEMBERS)}{hint}"
            )
        return folder

    @cached_property
    def pictures(self) -> list[str]:
        return [name for name in self.files if ending(name) in PICTURE_MEMBERS]

    @cached_property
    def unread(self) -> list[str]:
        return [name for name in self.files if ending(name) in UNREAD]

    def file(self, name: str) -> Path:
        return self.path / name


def walk(folder: str, closed: tuple[str, ...], start: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """The files under a folder; links to folders are followed, but for those that lead to one of the ``closed``."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry)
                if real not in closed:
                    yield from walk(entry.path, (*closed, real), f"{start}{entry.name}/")
            elif entry.is_file():
                yield start + entry.name, entry.stat()


def ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower().removeprefix(".")


def stem(name: str) -> str:
    """The path without the ending."""
    return name.removesuffix(PurePosixPath(name).suffix)


def same(name: str) -> str:
    """Names that mean the same become equal: Unicode has two ways to write an é, file systems differ in theirs."""
    return unicodedata.normalize("NFC", name)


def unique_keys(names: Sequence[str]) -> dict[str, str]:
    """Name → key, without folders and dots; names that would share one get a number each, made of the name alone."""
    plain = {name: re.sub(r"[/.]", "_", printable(stem(name))) for name in names}
    counts = Counter(plain.values())
    keys = {name: key if counts[key] == 1 else f"{key}_{number(name)}" for name, key in plain.items()}
    if len(set(keys.values())) < len(names):
        raise UserError("there are names that end with the number that tells two others apart: rename one of them")
    return keys


def number(name: str) -> str:
    return hashlib.blake2b(os.fsencode(name), digest_size=4).hexdigest()


def printable(name: str) -> str:
    """The name without line ends and bytes that are no text, which a terminal or a tar would stumble on."""
    return "".join(letter if letter.isprintable() else "_" for letter in name)


def examples(names: Iterable[str]) -> str:
    """``12 (a.jpg, b.jpg, c.jpg …)``"""
    listed = list(names)
    shown = ", ".join(printable(name) for name in listed[:SHOWN])
    return f"{len(listed):,} ({shown}{' …' if len(listed) > SHOWN else ''})"
