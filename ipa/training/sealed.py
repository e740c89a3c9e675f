"""Sealed files of tensors: a SHA-256 in the file itself tells one that was cut short or has rotted from a whole one.

torch's format is a zip archive, whose last field is a comment. There stands the hash of everything before the comment,
as ``sha256:…``; so there is one file to rename, and every reader of torch's format reads it as before. They are
read as far as tensors and plain containers go (``weights_only``): no pickled code runs.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from ipa.errors import UserError, brief
from ipa.files import write_atomically

MARK = b"sha256:"
LENGTH_BYTES = 2  # of the comment, the archive's last field before it
CHUNK = 1 << 22
BESIDES_TENSORS = 1 << 20  # bytes of a checkpoint that are not tensors', generously


class BrokenFile(UserError):
    """A sealed file that is not whole, or is none."""


class Sealing:
    """Passes on what is written, all but the archive's empty comment, and knows its hash.

    What the disk refuses is raised by ``close``: torch's writer would hide it behind an error of its own.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.held = b""
        self.refused: OSError | None = None

    def write(self, data: bytes) -> int:
        ready = self.held + bytes(data)
        ready, self.held = ready[:-LENGTH_BYTES], ready[-LENGTH_BYTES:]
        self.hash.update(ready)
        self.pass_on(ready)
        return len(data)

    def pass_on(self, data: bytes) -> None:
        if self.refused is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.refused = error

    def flush(self) -> None:
        """There is nothing to do before ``close``."""

    def close(self) -> None:
        if self.refused is not None:
            raise self.refused
        assert self.held == bytes(LENGTH_BYTES), "an archive that ends with a comment"
        comment = MARK + self.hash.hexdigest().encode()
        self.file.write(len(comment).to_bytes(LENGTH_BYTES, "little") + comment)


COMMENT_BYTES = len(MARK) + 2 * hashlib.sha256().digest_size


def write_sealed(path: Path, content: Any) -> None:
    """Write ``content``, tensors in plain containers, atomically; raises UserError, before it begins on a full disk."""
    check_space(path.parent, num_bytes(content) + BESIDES_TENSORS, path)

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            sealing = Sealing(file)
            torch.save(content, cast(IO[bytes], sealing))
            sealing.close()

    write_atomically(path, write)


def read_sealed(path: Path) -> Any:
    """The content, tensors on the CPU; raises BrokenFile with the reason, FileNotFoundError."""
    check_seal(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling foreign bytes raises nearly anything
        raise BrokenFile(f"it holds other things than tensors and plain containers ({brief(error)})") from error


def check_seal(path: Path) -> None:
    """Raise BrokenFile, with the reason, unless the file is whole; reads all of it."""
    size = path.stat().st_size
    rest = size - LENGTH_BYTES - COMMENT_BYTES
    with path.open("rb") as file:
        seen = hashlib.sha256()
        for length in (min(CHUNK, rest - start) for start in range(0, rest, CHUNK)):
            seen.update(file.read(length))
        seal = file.read(LENGTH_BYTES + COMMENT_BYTES)[LENGTH_BYTES:]
    if not seal.startswith(MARK):
        raise BrokenFile(f"it has no seal at its end, so it was cut short (at {size:,} bytes) or is something else")
    if seal.removeprefix(MARK) != seen.hexdigest().encode():
        raise BrokenFile("its content is not what was written (its SHA-256 differs)")


def num_bytes(content: Any) -> int:
    """Of the tensors in a tree of plain containers."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(map(num_bytes, content.values()))
    if isinstance(content, Iterable) and not isinstance(content, str | bytes):
        return sum(map(num_bytes, content))
    return 0


def check_space(folder: Path, needed: int, path: Path) -> None:
    """Raise UserError if fewer bytes than ``needed`` are free, before the file is begun."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            errno.ENOSPC,
            f"{path} needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there. What was written before is "
            "unharmed; free some space, keep fewer with checkpoint.keep_last, or choose another run folder with "
            "paths.runs=FOLDER; the same command then goes on",
        )
