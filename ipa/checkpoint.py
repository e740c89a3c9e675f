"""Adapter files: the adapter's own weights with metadata, written so that a kill or a full disk spares the old file.

The state that resumes a training (optimizer, step, data position) is Lightning's checkpoint, kept apart from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, force it to disk, then rename it.

    Raises OSError with the path and the advice when that fails; ``path`` then holds what it held before.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except Exception as error:
        raise OSError(
            f"could not write {path} ({type(error).__name__}: {error}). The file that was there before is unharmed; "
            "free some space or choose another run folder with paths.runs=FOLDER."
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def save_adapter(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata (strings only, as safetensors has it) to ``path``."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda beside: save_file(contiguous, beside, metadata))


def load_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read an adapter file; raises FileNotFoundError or ValueError naming the file."""
    metadata = read_metadata(path)
    return load_file(path), metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone; no tensor is read."""
    with open_header(path) as file:
        return file.metadata() or {}


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes alone; no tensor is read."""
    with open_header(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def open_header(path: Path):  # type: ignore[no-untyped-def]  # safetensors' handle has no public type
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"adapter={path}: no such file. A training run writes it as runs/…/adapter.safetensors."
        )
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise ValueError(f"adapter={path} is not a safetensors file ({error}); it may have been cut short.") from error
