"""Adapter files: whole or not there at all, and errors that name the file."""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipa.checkpoint import load_adapter, read_metadata, read_shapes, save_adapter, write_atomically

TENSORS = {
    "image_proj.proj.weight": torch.arange(24, dtype=torch.float16).reshape(8, 3).T,  # not contiguous
    "ip_adapter.1.to_k_ip.weight": torch.ones(2, 4),
}
METADATA = {"base": "demo/base", "step": "1200", "note": "λ = 0,5"}


def full_disk(beside: Path) -> None:
    beside.write_bytes(b"half of i")
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(beside: Path) -> None:
    beside.write_bytes(b"half of i")
    raise KeyboardInterrupt


def not_writing(beside: Path) -> None:
    pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


def test_tensors_and_metadata_come_back(path: Path) -> None:
    save_adapter(path, TENSORS, METADATA)
    tensors, metadata = load_adapter(path)

    assert metadata == METADATA == read_metadata(path)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_a_file_of_others_without_metadata_is_read(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, path)

    assert load_adapter(path)[1] == {}


def test_the_folder_is_made(tmp_path: Path) -> None:
    save_adapter(tmp_path / "runs" / "x" / "adapter.safetensors", TENSORS, METADATA)

    assert [file.name for file in (tmp_path / "runs" / "x").iterdir()] == ["adapter.safetensors"]


def test_shapes_are_read_without_a_tensor(path: Path) -> None:
    # the weights are of a type that torch cannot hold, so reading one of them fails
    header = json.dumps(
        {"w": {"dtype": "F6_E2M3", "shape": [4, 8], "data_offsets": [0, 24]}, "__metadata__": {"step": "3"}}
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(24))

    with pytest.raises(Exception, match="F6_E2M3"):
        load_file(path)
    assert read_shapes(path) == {"w": (4, 8)}
    assert read_metadata(path) == {"step": "3"}


def test_shapes_are_those_of_the_tensors(path: Path) -> None:
    save_adapter(path, TENSORS, METADATA)

    assert read_shapes(path) == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("write", [full_disk, not_writing])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(path: Path, write: Callable[[Path], None]) -> None:
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"adapter\.safetensors.*unharmed") as caught:
        write_atomically(path, write)

    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_an_interruption_leaves_the_old_file_and_nothing_else(path: Path) -> None:
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)

    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_told_with_what_to_do(path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device.*free some space.*paths\.runs=") as caught:
        write_atomically(path, full_disk)

    assert caught.value.__cause__ is not None
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_alike(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match=r"could not write .*taken/adapter.*another run folder"):
        save_adapter(tmp_path / "taken" / "adapter.safetensors", TENSORS, METADATA)


def test_metadata_that_is_no_text_leaves_the_old_file(path: Path) -> None:
    save_adapter(path, TENSORS, METADATA)
    with pytest.raises(OSError, match="could not write"):
        save_adapter(path, {}, {"step": 3})  # type: ignore[dict-item]

    assert load_adapter(path)[1] == METADATA


@pytest.mark.parametrize("read", [load_adapter, read_metadata, read_shapes])
def test_a_file_cut_short_is_named(path: Path, read: Callable[[Path], object]) -> None:
    save_adapter(path, TENSORS, METADATA)
    whole = path.read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{path} is not a safetensors file .* cut short"):
            read(path)


@pytest.mark.parametrize("read", [load_adapter, read_metadata, read_shapes])
def test_a_missing_file_is_named(path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(FileNotFoundError, match=rf"adapter={path}: no such file"):
        read(path)
    with pytest.raises(FileNotFoundError, match=rf"adapter={path.parent}: no such file"):
        read(path.parent)
