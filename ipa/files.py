"""Files: atomic writing, JSON, hashes, picture extensions. Imports only the standard library."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ipa.errors import UserError, brief

# the extensions that ``data.images.opening`` reads; the first in this order is a sample's image
PICTURES = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    *("avif", "jfif", "jpe", "jp2", "ppm", "heic", "heif"),
)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
PICTURE_EXTENSIONS = tuple(f".{extension}" for extension in PICTURES)
OTHER_FOLDER = "choose a folder on another disk"
FOLDER_FSYNC_UNSUPPORTED = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF}


def write_atomically(path: Path, write: Callable[[Path], object], otherwise: str = OTHER_FOLDER) -> None:
    """Let ``write`` create a temporary file next to ``path``, fsync it, then rename it to ``path``.

    The permissions follow the umask. Raises UserError with the path and the advice ``otherwise`` if the system refuses
    to write; ``path`` then keeps its previous content. Errors of ``write`` itself pass through unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = mode_of_new_file(temporary)
        write(temporary)
        with suppress(OSError):  # some file systems have no permissions
            temporary.chmod(mode)  # safetensors creates files that only their owner can read
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)  # the directory entry too
    except OSError as error:
        raise UserError(
            f"could not write {path} ({brief(error)}). The previous file is intact; free some space or {otherwise}."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove temporary files that a killed ``write_atomically`` left; no process may be writing these files."""
    wanted = set(paths)
    for folder in {path.parent for path in wanted}:
        for leftover in folder.glob(".*.tmp"):
            if folder / leftover.name[1:].rsplit(".", 2)[0] in wanted:
                leftover.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Force a file to disk, or the entries of a folder where the file system supports that (mounted buckets do not)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in FOLDER_FSYNC_UNSUPPORTED):
            raise


def mode_of_new_file(path: Path) -> int:
    """Permissions of a new file there; ``os.umask`` would change the mask for every thread."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()  # a writer that fails silently must not leave an empty file
    return mode


def write_json(path: Path, content: Any, indent: int = 1, otherwise: str = OTHER_FOLDER) -> None:
    """Write JSON atomically; raises as ``write_atomically`` does."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"), otherwise)


def read_json(path: Path, advice: str = "remove it") -> dict[str, Any]:
    """A JSON object; raises UserError with ``advice`` for a file with anything else."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # invalid JSON, or bytes that are not text
        raise UserError(f"{path} is not JSON ({error}): {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected an object: {advice}")
    return content


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name; names with a leading dot are not (macOS adds ._NAME to each file)."""
    return not os.path.basename(name).startswith(".") and name.lower().endswith(PICTURE_EXTENSIONS)


def is_hub_id(path: str) -> bool:
    """Whether this may be owner/name on the model hub: it has this form, and there is no folder ``owner`` here."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).parent.is_dir()


def pictures_in(folder: str | Path, option: str) -> list[Path]:
    """Sorted by name; raises UserError, which names the ``option``, if there are none."""
    found = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    pictures = [path for path in found if is_picture(path.name) and path.is_file()]
    if not pictures:
        raise UserError(f"{option}={folder}: give a folder with images ({', '.join(PICTURE_EXTENSIONS)})")
    return pictures


def printable(name: str) -> str:
    """Without line breaks and undecodable bytes, which break terminals and tar files."""
    return "".join(letter if letter.isprintable() else "_" for letter in name)


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8, with or without a byte order mark; raises UserError for another encoding, OSError."""
    content = Path(path).read_bytes()
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: byte {error.start} (line {line}) is 0x{content[error.start]:02x}. Save it as UTF-8; "
            "if it is Latin-1: iconv -f latin1 -t utf-8"
        ) from error


def read_list(path: str | os.PathLike[str]) -> list[str]:
    """A text file with an entry per line; comments (# at the beginning), blank lines and quotes are left out."""
    lines = [line.strip() for line in read_text(path).split("\n")]
    return [line.strip("'\"") for line in lines if line and not line.startswith("#")]


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def public_source(source: str) -> str:
    """A hub id or relative path unchanged; of an absolute path the name, since adapter files are published."""
    prefix, _, path = source.rpartition(":")  # local-dir:/data/clip
    return source if not Path(path).is_absolute() else f"{prefix}:{Path(path).name}".lstrip(":")
