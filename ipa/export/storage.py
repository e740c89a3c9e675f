"""Reads and writes adapter files: names, tensors and metadata, without interpreting them.

Two formats, by file ending: ``.safetensors`` with metadata, and pickles as torch saves them: the ``.bin`` of the first
published adapters, ``{"image_proj": {…}, "ip_adapter": {…}}`` without metadata, and other programs' checkpoints.
Pickles are read with ``weights_only``.

The state that resumes a training (optimizer, step, data position) is in Lightning's checkpoint, not here.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ipa.errors import UserError, brief
from ipa.files import write_atomically

SAFETENSORS, PICKLE = ".safetensors", ".bin"
PICKLES = (PICKLE, ".pt", ".pth", ".ckpt")
MAX_NESTING = 20


def save_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata atomically; the same content gives the same bytes. A ``.bin`` has no metadata.

    Raises UserError.
    """
    check_output(path)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix == PICKLE:
        write_atomically(path, lambda temporary: save_pickle(contiguous, temporary))
    else:
        write_atomically(path, lambda temporary: save_safetensors(contiguous, temporary, metadata))


def check_output(path: Path, option: str = "adapter") -> None:
    """Raise UserError for an ending of neither format."""
    if path.suffix not in (SAFETENSORS, PICKLE):
        raise UserError(f"{option}={path}: an adapter file ends with {SAFETENSORS} or {PICKLE}")


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Raises OSError if the disk is full, for which safetensors has an error of its own."""
    try:
        save_file(tensors, path, dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    if metadata:
        sort_metadata(path)


def sort_metadata(path: Path) -> None:
    """safetensors writes metadata in random order; sorted, the file's hash depends on its content alone."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "the same entries take the same space"
        file.seek(8)
        file.write(text.ljust(length))


def save_pickle(tensors: Mapping[str, Tensor], path: Path) -> None:
    content = io.BytesIO()  # torch's own file writer ends the process if it cannot write
    torch.save(nested({name: tensor.clone() for name, tensor in tensors.items()}), content)  # a view saves all of it
    path.write_bytes(content.getbuffer())


def load_adapter(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """All entries by dotted names, memory-mapped if possible, and the metadata.

    Entries of a safetensors file are tensors in the file's dtypes; a pickle can contain anything that runs no code.
    Raises UserError for a file that is missing, damaged, or would run code.
    """
    if not path.exists() and path.suffix in ("", SAFETENSORS, *PICKLES):
        raise UserError(f"adapter={path}: no such file or folder. A training run writes runs/…/adapter.safetensors.")
    if not path.is_file() or path.suffix not in (SAFETENSORS, *PICKLES):
        advice = "; a training writes it as adapter.safetensors into its run folder" if path.is_dir() else ""
        raise UserError(f"{path}: an adapter file ends with {SAFETENSORS}, {', '.join(PICKLES)}{advice}")
    return load_safetensors(path) if path.suffix == SAFETENSORS else (load_pickle(path), {})


def load_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors' own exception is none of Python's
        raise UserError(f"adapter={path} is not a safetensors file ({brief(error)}); it may be truncated.") from error


def load_pickle(path: Path) -> dict[str, Any]:
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip and path.suffix == ".ckpt":
            check_members(path)
        # mapped into memory, compressed members would be taken for weights
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip and not is_compressed(path))
        if not isinstance(content, Mapping):
            raise TypeError(f"it holds a {type(content).__name__}")
        return dict(flattened(content))
    except Exception as error:  # unpickling damaged or foreign bytes raises nearly anything
        raise UserError(
            f"adapter={path} cannot be read as tensors only ({brief(error)}): it is truncated, not an adapter, or "
            "holds objects that can run code when unpickled. Ask its author for a .safetensors file."
        ) from error


def check_members(path: Path) -> None:
    """Raise BadZipFile for a member of the archive with another CRC-32."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"it is damaged (CRC-32 of {damaged})")


def is_published(path: Path) -> bool:
    """Whether other programs read the file as it is: safetensors, or a pickle of two mappings without compression."""
    if path.suffix == SAFETENSORS:
        return True
    if is_compressed(path):
        return False
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return all(isinstance(content.get(group), Mapping) for group in ("image_proj", "ip_adapter"))


def is_compressed(path: Path) -> bool:
    """Whether it is an archive with compressed members, which torch does not write and other programs misread."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())


def flattened(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings → dotted names; everything else is a leaf. Raises ValueError for endless nesting."""
    if prefix.count(".") > MAX_NESTING:
        raise ValueError("it is nested too deeply")
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Dotted names → one dict for each first word, in the published order."""
    groups: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    return groups
