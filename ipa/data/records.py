"""One shard → records: the bytes of a picture and its caption, as img2dataset wrote them, or the reason why not.

WebDataset opens the shard (local files, URLs, pipes) and splits the member names. Walking the archive is done here: at
a damaged header in the middle Python's tarfile, and so WebDataset's own stage, stops as if the file had ended there.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from ipa.data.rejects import (
    BROKEN_METADATA,
    BROKEN_TAR,
    DUPLICATE_KEY,
    EMPTY_CAPTION,
    NO_CAPTION,
    NO_PICTURE,
    NOT_UTF8,
    Rejected,
)
from ipa.data.shards import open_shard, shard_name

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")


class Member(NamedTuple):
    """A file in the archive, or where the archive breaks (``broken``, and no key)."""

    key: str = ""
    extension: str = ""
    content: bytes = b""
    broken: Rejected | None = None


@dataclass
class Record:
    """A sample as it lies in the shard.

    ``rejects`` are its unusable neighbours, so that each is counted once. ``broken`` says why its picture could not be
    decoded, once that was tried.
    """

    key: str
    shard: str
    index: int
    picture: bytes
    caption: str
    rejects: list[Rejected] = field(default_factory=list)
    broken: Rejected | None = None


class StrictTarInfo(tarfile.TarInfo):
    """A header that is damaged, cut off or missing is an error, not the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> StrictTarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the two zero blocks that end an archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


def read_members(shard: str) -> Iterator[Member]:
    """All members with a key; a break of the archive comes last."""
    try:
        with open_shard(shard) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo) as tar:
            for info in tar:
                key, extension = base_plus_ext(info.name)
                content = tar.extractfile(info) if info.isreg() and key else None
                if content is not None:
                    yield Member(key, extension.lower(), content.read())
                tar.members = []  # type: ignore[attr-defined]  # tarfile would remember every member of a stream
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        yield Member(broken=Rejected(BROKEN_TAR, f"{shard}: {error}"))


def read_shard(shard: str, caption_key: str) -> Iterator[Record | Rejected]:
    """The samples of a shard in file order, ``index`` counting good and bad ones.

    Of samples with the same key the first counts. The sample at a break is delivered if it was complete; if not, it is
    part of the break and not counted by itself.
    """
    name, seen = shard_name(shard), set[str]()
    held: Record | Rejected | None = None
    groups = groupby(read_members(shard), key=attrgetter("key", "broken"))
    for index, ((key, broken), members) in enumerate(groups):
        if held is not None and not (broken and isinstance(held, Rejected)):
            yield held
        if broken:
            yield broken
            return
        fields, doubled = collect(members)
        if doubled and key not in seen:
            yield Rejected(DUPLICATE_KEY, key)
        held = Rejected(DUPLICATE_KEY, key) if key in seen else make_record(key, name, index, fields, caption_key)
        seen.add(key)
    if held is not None:
        yield held


def collect(members: Iterable[Member]) -> tuple[dict[str, bytes], bool]:
    """Extension → content of one key, the first of each, and whether one came twice."""
    fields: dict[str, bytes] = {}
    doubled = False
    for member in members:
        doubled |= member.extension in fields
        fields.setdefault(member.extension, member.content)
    return fields, doubled


def make_record(key: str, shard: str, index: int, fields: dict[str, bytes], caption_key: str) -> Record | Rejected:
    picture = next((fields[extension] for extension in PICTURES if extension in fields), None)
    if picture is None:
        return Rejected(NO_PICTURE, key)
    try:
        return Record(key, shard, index, picture, read_caption(fields, caption_key))
    except Rejected as reject:
        return reject


def read_caption(fields: dict[str, bytes], caption_key: str) -> str:
    """``caption_key`` is a member's extension (``txt``), or ``json.NAME`` for an entry of the metadata."""
    extension, _, entry = caption_key.partition(".") if caption_key.startswith("json.") else (caption_key, "", "")
    if extension not in fields:
        raise Rejected(NO_CAPTION)
    try:
        text = fields[extension].decode()
        caption = json.loads(text).get(entry) if entry else text
    except UnicodeDecodeError as error:
        raise Rejected(NOT_UTF8, str(error)) from error
    except (ValueError, AttributeError) as error:
        raise Rejected(BROKEN_METADATA, str(error)) from error
    if not isinstance(caption, str):
        raise Rejected(NO_CAPTION)
    if not caption.strip():
        raise Rejected(EMPTY_CAPTION)
    return caption.strip()
