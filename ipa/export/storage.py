"""Reading and writing adapter files: the adapter's own weights with metadata.

Two formats, by file ending: ``.safetensors`` with metadata, and the ``.bin`` of the first published adapters, a pickled
``{"image_proj": {…}, "ip_adapter": {…}}`` without. Pickles are read with ``weights_only``.

The state that resumes a training (optimizer, step, data position) is in Lightning's checkpoint, not here.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipa.errors import UserError, brief
from ipa.files import write_atomically

SAFETENSORS, PICKLE = ".safetensors", ".bin"


def save_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata atomically; a ``.bin`` has no metadata. Raises UserError."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if is_pickle(path):
        write_atomically(path, lambda temporary: save_pickle(contiguous, temporary))
    else:
        write_atomically(path, lambda temporary: save_safetensors(contiguous, temporary, dict(metadata)))


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Raises OSError if the disk is full, for which safetensors has an error of its own."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def save_pickle(tensors: Mapping[str, Tensor], path: Path) -> None:
    content = io.BytesIO()  # torch's own file writer ends the process if it cannot write
    torch.save(nested({name: tensor.clone() for name, tensor in tensors.items()}), content)  # a view saves all of it
    path.write_bytes(content.getbuffer())


def load_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, in the file's dtypes, and metadata. Raises UserError for a file that is damaged or would run code."""
    if is_pickle(path):
        return read_pickle(path), {}
    metadata = read_metadata(path)
    return load_file(path), metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata, without reading a tensor; a ``.bin`` has none."""
    if is_pickle(path):
        check_exists(path)
        return {}
    with open_header(path) as file:
        return file.metadata() or {}


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes, without reading a tensor (those of a ``.bin`` are memory-mapped)."""
    if is_pickle(path):
        return {name: tuple(tensor.shape) for name, tensor in read_pickle(path).items()}
    with open_header(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def is_pickle(path: Path) -> bool:
    """Whether the file is a ``.bin``; raises UserError for an ending of neither format."""
    if path.suffix not in (SAFETENSORS, PICKLE):
        raise UserError(f"{path}: an adapter file ends with {SAFETENSORS} or {PICKLE}{advice_on(path)}")
    return path.suffix == PICKLE


def advice_on(path: Path) -> str:
    if path.is_dir():
        return "; a training writes it as adapter.safetensors into its run folder"
    return "; python -m ipa.tools.export makes one from a checkpoint" if path.suffix == ".ckpt" else ""


def check_exists(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"adapter={path}: no such file. A training run writes it as runs/…/adapter.safetensors.")


def open_header(path: Path) -> Any:  # the type of safetensors' handle is private
    check_exists(path)
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise UserError(f"adapter={path} is not a safetensors file ({error}); it may be truncated.") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` by flat names, ``image_proj.…`` and ``ip_adapter.…``; raises UserError."""
    check_exists(path)
    try:
        return dict(flattened(load_pickle(path)))
    except Exception as error:  # unpickling damaged or foreign bytes raises nearly anything
        raise UserError(
            f"adapter={path} cannot be read as tensors only ({brief(error)}): it is truncated, not an adapter, or "
            "holds objects that can run code when unpickled. Ask its author for a .safetensors file."
        ) from error


def load_pickle(path: Path) -> Any:
    """What torch saved at ``path``: tensors and plain containers only, on the CPU and memory-mapped if possible."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def flattened(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Nested dicts of tensors → dotted names; raises TypeError for anything else."""
    if not isinstance(content, Mapping):
        raise TypeError(f"{prefix.rstrip('.') or 'the file'} holds a {type(content).__name__}")
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
