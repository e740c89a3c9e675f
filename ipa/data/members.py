"""Shards → members: the regular files of a tar, read from front to back, or where it breaks.

WebDataset opens the shard (local files, URLs, pipes) and splits the names. Walking the archive is done here: at a
damaged header in the middle Python's tarfile, and so WebDataset's own stage, stops as if the file had ended there; and
it copies all that it reads from a stream. Plain headers are read directly, all others (long names, PAX, the end,
damage) are left to tarfile.

Nothing is unpacked to disk. Links, devices, pipes and names with ``..`` or from the root have no place in a shard: they
are told as refused, and so is what is larger than any picture, of which no byte is kept. A compressed archive that
would grow beyond all measure counts as broken where it does.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, cast

from webdataset.tariterators import base_plus_ext

from ipa.data.rejects import BROKEN_TAR, TOO_LARGE, UNSAFE_MEMBER, Rejected
from ipa.data.shards import open_shard
from ipa.secrets import hide

BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 24
LARGEST = 1 << 29  # bytes of a member: 100 megapixels without compression are 300 MB at most
INFLATES, GRATIS = 200, 1 << 26  # bytes out of each that was read, and bytes that are never asked about
XZ_MEMORY = 1 << 28
ROOTED = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
REGULAR, EXTENDED = ord(tarfile.REGTYPE), ord(tarfile.XHDTYPE)
BREAKS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)

# PAX records that change neither a member's name nor its length. WebDataset's TarWriter, and so img2dataset, writes
# one for the time in front of every member.
IDLE_RECORDS = re.compile(rb"(?:[1-9]\d* (?:[acm]time|[ug]id|[ug]name)=[^\n]*\n)+\0*")

COMPRESSIONS: tuple[tuple[re.Pattern[bytes], Callable[[Any], Any]], ...] = (
    (re.compile(rb"\x1f\x8b\x08"), gzip.open),
    (re.compile(rb"BZh[1-9]1AY&SY"), bz2.open),
    (re.compile(rb"\xfd7zXZ|\x5d\0\0\x80"), lambda file: Unxz(file)),
)


class Member(NamedTuple):
    """A file in the archive; without a key, what is not taken out (``refused``), or where it breaks (``broken``)."""

    key: str = ""
    extension: str = ""
    content: bytes = b""
    broken: Rejected | None = None
    refused: Rejected | None = None


def read_members(shard: str) -> Iterator[Member]:
    """All regular files with a key, extensions in lower case, and what is refused; a break of the archive is last."""
    file: IO[bytes] | None = None
    try:
        file = open_shard(shard)
        stream = getattr(file, "stream", file)  # WebDataset's pipes drop what they read last from a program that failed
        for name, content in walk(uncompressed(Forward(stream))):
            if isinstance(content, Rejected):
                yield Member(refused=content)
                continue
            key, extension = base_plus_ext(name)
            if key:
                yield Member(key, extension.lower(), content)
        while stream.read(CHUNK):  # a program that cannot write to its end would fail
            pass
        file.close()
    except BREAKS as error:
        yield Member(broken=Rejected(BROKEN_TAR, hide(f"{shard}: {error}{closed(file)}")))
    finally:
        closed(file)  # a program fails when it is left in the middle, which is no break


def closed(file: IO[bytes] | None) -> str:
    """How a program failed, if it did."""
    try:
        if file is not None:
            file.close()
    except OSError as error:
        return f"; {error}"
    return ""


class Forward:
    """A file that is read forwards only; ``back`` puts the last bytes back."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.pending = b""
        self.position = 0

    def read(self, size: int) -> bytes:
        """Fewer bytes than ``size`` only at the end of the file."""
        if self.pending:
            data, self.pending = self.pending[:size], self.pending[size:]
        else:
            data = self.file.read(min(size, CHUNK))
        if len(data) < size:
            data = self.complete(data, size)
        self.position += len(data)
        return data

    def complete(self, data: bytes, size: int) -> bytes:
        """In chunks, since a damaged header may ask for any number of bytes."""
        parts = [data]
        missing = size - len(data)
        while missing and (part := self.file.read(min(missing, CHUNK))):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def skip(self, size: int) -> int:
        """Read so many bytes and keep none; fewer only at the end of the file."""
        skipped = 0
        while skipped < size and (data := self.read(min(CHUNK, size - skipped))):
            skipped += len(data)
        return skipped

    def back(self, data: bytes) -> None:
        self.pending = data + self.pending
        self.position -= len(data)

    def tell(self) -> int:
        return self.position


def uncompressed(file: Forward) -> Forward:
    """The archive inside gzip, bzip2 or xz, told by the first bytes; other files as they are."""
    begin = file.read(BLOCK)
    file.back(begin)
    opens = [opener for magic, opener in COMPRESSIONS if magic.match(begin)]
    return Forward(cast(IO[bytes], Inflating(opens[0](file), file))) if opens else file


class Inflating:
    """What a compressed archive holds; a bomb is an error before it is large."""

    def __init__(self, content: Any, archive: Forward) -> None:
        self.content, self.archive, self.given = content, archive, 0

    def read(self, size: int) -> bytes:
        data: bytes = self.content.read(size)
        self.given += len(data)
        if self.given > GRATIS + INFLATES * self.archive.tell():
            raise tarfile.ReadError(f"it grows to more than {INFLATES} times its size after {self.given:,} bytes")
        return data


class Unxz:
    """xz with a limit of memory, which a header may set to gigabytes and Python's own reader does not ask about."""

    def __init__(self, file: Forward) -> None:
        self.file = file
        self.decoder = self.new()

    def new(self) -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def read(self, size: int) -> bytes:
        while size:
            if self.decoder.eof:
                rest = self.decoder.unused_data.lstrip(b"\0") or self.file.read(BLOCK)
                if not rest.strip(b"\0"):
                    return b""
                self.decoder = self.new()
            else:
                rest = self.file.read(1 << 16) if self.decoder.needs_input else b""
                if self.decoder.needs_input and not rest:
                    raise EOFError("the compressed archive is cut off")
            if data := self.decoder.decompress(rest, size):
                return data
        return b""


def walk(file: Forward) -> Iterator[tuple[str, bytes | Rejected]]:
    """Name and content of each regular file, or why it is not taken.

    Raises one of ``BREAKS`` where the archive is damaged or cut off.
    """
    archive = Archive(file)
    header = file.read(BLOCK)
    while entry := archive.entry(header):
        refused = refusal(entry)
        content = b"" if refused else file.read(entry.size)
        if len(content) < entry.size and (not refused or file.skip(entry.size) < entry.size):
            raise cut_off(file)
        if refused:
            yield entry.name, refused
        elif entry.regular:
            yield entry.name, content
        padding = -entry.size % BLOCK
        header = file.read(padding + BLOCK)
        if len(header) < padding:
            raise cut_off(file)
        header = header[padding:]


def refusal(entry: Entry) -> Rejected | None:
    """Why a member is not taken out of its archive, if it is not."""
    if entry.special:
        return Rejected(UNSAFE_MEMBER, f"{entry.name}: a link, a device or a pipe")
    if ROOTED.match(entry.name) or (".." in entry.name and ".." in re.split(r"[/\\]", entry.name)):
        return Rejected(UNSAFE_MEMBER, f"{entry.name}: a place outside the archive's folder")
    if entry.size > LARGEST:
        return Rejected(TOO_LARGE, f"{entry.name}: {entry.size:,} bytes")
    return None


def cut_off(file: Forward) -> tarfile.ReadError:
    return tarfile.ReadError(f"it is cut off at byte {file.tell()}")


class Entry(NamedTuple):
    """A header, and the number of bytes that belong to it."""

    name: str
    size: int
    regular: bool = True
    special: bool = False  # neither a file nor a folder


class Archive:
    """Headers → entries; has what ``TarInfo.fromtarfile``, which reads all but plain ones, asks of a ``TarFile``."""

    encoding = "utf-8"
    errors = "surrogateescape"

    def __init__(self, file: Forward) -> None:
        self.fileobj = file
        self.pax_headers: dict[str, str] = {}
        self.offset = 0

    def entry(self, header: bytes) -> Entry | None:
        """The entry that begins with this block, just read; None at the end of the archive."""
        if self.pax_headers:
            return self.any_entry(header)
        blocks, size = header, plain_size(header, EXTENDED)
        if size is not None and 0 < size <= BLOCK:
            blocks += self.fileobj.read(2 * BLOCK)
            if IDLE_RECORDS.fullmatch(blocks, BLOCK, 2 * BLOCK):
                header = blocks[2 * BLOCK :]
        size = plain_size(header, REGULAR)
        return self.any_entry(blocks) if size is None else Entry(plain_name(header), size)

    def any_entry(self, blocks: bytes) -> Entry | None:
        self.fileobj.back(blocks)
        try:
            info = StrictTarInfo.fromtarfile(cast(tarfile.TarFile, self))
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return None
        except RecursionError as error:  # a header before a header, thousands of times
            raise tarfile.ReadError(f"headers without end at byte {self.fileobj.tell()}") from error
        if info.issparse():
            raise tarfile.ReadError(f"{info.name} is a sparse file, which is not read, at byte {self.fileobj.tell()}")
        if info.isreg():
            return Entry(info.name, info.size)
        special = not info.isdir()
        return Entry(info.name, self.offset - self.fileobj.tell(), regular=False, special=special)


class StrictTarInfo(tarfile.TarInfo):
    """A header that is damaged, cut off or missing is an error, not the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> StrictTarInfo:
        try:
            info = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zero blocks that end an archive
            raise
        except (tarfile.HeaderError, ValueError) as error:
            raise tarfile.ReadError(f"{error} at byte {tar.fileobj.tell()}") from error
        if info.size < 0:
            raise tarfile.ReadError(f"a size below zero at byte {tar.fileobj.tell()}")
        return info


def plain_size(header: bytes, kind: int) -> int | None:
    """The size in a header of this kind whose name is whole and whose checksum is right; None for all others."""
    if len(header) < BLOCK or header[156] != kind or header[345]:
        return None
    try:
        size, checksum = int(header[124:136].rstrip(b"\0 "), 8), int(header[148:156].rstrip(b"\0 "), 8)
    except ValueError:
        return None
    return size if size >= 0 and checksum == sum(header) - sum(header[148:156]) + 8 * ord(" ") else None


def plain_name(header: bytes) -> str:
    return header[:100].partition(b"\0")[0].decode(Archive.encoding, Archive.errors)
