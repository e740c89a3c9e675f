"""Adapter files: the adapter's own weights with metadata, written so that a kill or a full disk spares the old file.

Two formats, told by their ending: ``.safetensors`` with metadata, and the first published ones' ``.bin``, a pickled
``{"image_proj": {…}, "ip_adapter": {…}}`` without any. Pickles are read only as far as tensors go.

The state that resumes a training (optimizer, step, data position) is Lightning's checkpoint, kept apart from it.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SAFETENSORS, PICKLE = ".safetensors", ".bin"
OTHER_RUN_FOLDER = "choose another run folder with paths.runs=FOLDER"
NOT_FOR_FOLDERS = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF}


def write_atomically(path: Path, write: Callable[[Path], object], otherwise: str = OTHER_RUN_FOLDER) -> None:
    """Let ``write`` make a file beside ``path``, force it to disk, then rename it; its permissions are the umask's.

    Raises OSError with the path and the advice (``otherwise``) when that fails; ``path`` then holds what it held
    before.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = mode_of_new(beside)
        write(beside)
        with suppress(OSError):  # some file systems have no permissions
            beside.chmod(mode)  # safetensors makes files that only their owner can read
        force_to_disk(beside)
        os.replace(beside, path)
        force_to_disk(path.parent)  # the new name, too
    except Exception as error:
        raise OSError(
            f"could not write {path} ({type(error).__name__}: {error}). The file that was there before is unharmed; "
            f"free some space or {otherwise}."
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def force_to_disk(path: Path) -> None:
    """A file, or the names in a folder where the system lets a folder be opened and forced; mounted buckets do not."""
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        if not (path.is_dir() and error.errno in NOT_FOR_FOLDERS):
            raise


def mode_of_new(path: Path) -> int:
    """The permissions of a new file there: asking ``os.umask`` would change it for all threads."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def save_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata (strings only, as safetensors has it); a ``.bin`` goes without the metadata.

    Raises ValueError for another ending, OSError when the file cannot be written.
    """
    path = Path(path)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if is_pickle(path):
        write_atomically(path, lambda beside: save_pickle(contiguous, beside))
    else:
        write_atomically(path, lambda beside: save_file(contiguous, beside, dict(metadata)))


def save_pickle(tensors: Mapping[str, Tensor], path: Path) -> None:
    content = io.BytesIO()  # torch's own file writer ends the process when it cannot write
    torch.save(
        nested({name: tensor.clone() for name, tensor in tensors.items()}), content
    )  # a part would save its whole
    path.write_bytes(content.getbuffer())


def load_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read an adapter file, tensors in the dtypes they have there.

    Raises FileNotFoundError, or ValueError naming the file when it is damaged, foreign or would run code.
    """
    path = Path(path)
    if is_pickle(path):
        return read_pickle(path), {}
    metadata = read_metadata(path)
    return load_file(path), metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone; no tensor is read. A ``.bin`` has none."""
    if is_pickle(path):
        check_exists(path)
        return {}
    with open_header(path) as file:
        return file.metadata() or {}


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes alone; no tensor is read (those of a ``.bin`` stay on disk until somebody looks at them)."""
    if is_pickle(path):
        return {name: tuple(tensor.shape) for name, tensor in read_pickle(path).items()}
    with open_header(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def is_pickle(path: Path) -> bool:
    """Which of the two formats; raises ValueError for an ending of neither."""
    suffix = Path(path).suffix
    if suffix not in (SAFETENSORS, PICKLE):
        raise ValueError(f"{path}: an adapter file ends with {SAFETENSORS} or {PICKLE}{advice_on(path)}")
    return suffix == PICKLE


def advice_on(path: Path) -> str:
    """Where to find the adapter file instead of ``path``; empty when nobody knows."""
    if Path(path).is_dir():
        return "; a training writes it as adapter.safetensors into the folder of its run"
    return "; python -m ipa.tools.export makes one of a training's checkpoint" if Path(path).suffix == ".ckpt" else ""


def check_exists(path: Path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"adapter={path}: no such file. A training run writes it as runs/…/adapter.safetensors."
        )


def open_header(path: Path) -> Any:  # safetensors' handle has no public type
    check_exists(path)
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise ValueError(f"adapter={path} is not a safetensors file ({error}); it may have been cut short.") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A ``.bin`` as flat names, ``image_proj.…`` and ``ip_adapter.…``; raises as ``load_adapter`` does."""
    check_exists(path)
    try:
        return dict(flattened(load_pickle(path)))
    except Exception as error:  # unpickling damaged or foreign bytes raises nearly anything
        raise ValueError(
            f"adapter={path} cannot be read as tensors alone ({brief(error)}): it was cut short, is no adapter, or "
            "holds objects that can run code when they are opened. Ask its author for a .safetensors file."
        ) from error


def load_pickle(path: Path) -> Any:
    """What torch saved at ``path``, as far as tensors and plain containers go, on the CPU and read when looked at."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def flattened(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Nested dicts of tensors → dotted names; raises TypeError for anything else."""
    if not isinstance(content, Mapping):
        raise TypeError(f"{prefix.rstrip('.') or 'it'} holds {type(content).__name__}")
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from flattened(value, f"{prefix}{name}.")


def nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Dotted names → one dict for each first word, in the published order."""
    groups: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def brief(error: Exception) -> str:
    """The first line of a library's message; torch explains on a page of its own how to run a pickle's code."""
    first = next(iter(str(error).splitlines()), "").partition(". ")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
