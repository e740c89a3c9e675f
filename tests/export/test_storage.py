"""Adapter files: whole or not there at all, and errors that name the file."""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ipa.errors import UserError
from ipa.export.storage import load_adapter, read_metadata, read_shapes, save_adapter
from ipa.files import fsync, write_atomically

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
    with pytest.raises(UserError, match=r"adapter\.safetensors.*unharmed") as caught:
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
    with pytest.raises(UserError, match=r"No space left on device.*free some space.*paths\.runs=") as caught:
        write_atomically(path, full_disk)

    assert caught.value.__cause__ is not None
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_alike(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"could not write .*taken/adapter.*another run folder"):
        save_adapter(tmp_path / "taken" / "adapter.safetensors", TENSORS, METADATA)


def test_metadata_that_is_no_text_leaves_the_old_file(path: Path) -> None:
    save_adapter(path, TENSORS, METADATA)
    with pytest.raises(UserError, match="could not write"):
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
    with pytest.raises(UserError, match=rf"adapter={path}: no such file"):
        read(path)
    with pytest.raises(ValueError, match=rf"{path.parent}: .* writes it as adapter\.safetensors into the folder"):
        read(path.parent)
    with pytest.raises(ValueError, match=r"last\.ckpt: .*; python -m ipa\.tools\.export makes one"):
        read(path.with_name("last.ckpt"))


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    return tmp_path / "adapter.bin"


class Evil:
    """An object that runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def test_a_pickle_gives_the_tensors_of_the_other_format(path: Path, pickled: Path) -> None:
    """With the numbers and types that were written, in the published nesting, without the metadata."""
    mixed = {"image_proj.proj.weight": torch.randn(8, 3), "ip_adapter.1.to_k_ip.weight": torch.ones(2, 4).half()}
    for file in (path, pickled):
        save_adapter(file, mixed, METADATA)
    content = torch.load(pickled, weights_only=True)

    assert list(content) == ["image_proj", "ip_adapter"]
    assert list(content["ip_adapter"]) == ["1.to_k_ip.weight"]
    assert load_adapter(path)[1] == METADATA and load_adapter(pickled)[1] == read_metadata(pickled) == {}
    assert read_shapes(pickled) == read_shapes(path)
    for tensors in (load_adapter(path)[0], load_adapter(pickled)[0]):
        assert tensors.keys() == mixed.keys()
        assert all(tensors[name].dtype == value.dtype for name, value in mixed.items())
        assert all(torch.equal(tensors[name], value) for name, value in mixed.items())


def test_a_pickle_of_a_part_does_not_hold_the_whole(pickled: Path) -> None:
    save_adapter(pickled, {"image_proj.latents": torch.zeros(1_000_000)[:10]}, {})

    assert pickled.stat().st_size < 10_000


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
@pytest.mark.parametrize("read", [load_adapter, read_shapes])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(
    pickled: Path, save: Callable[[Any, Path], None], read: Callable[[Path], object]
) -> None:
    trace = pickled.with_name("trace")
    save({"image_proj": {"proj.weight": torch.ones(2), "evil": Evil(trace)}, "ip_adapter": {}}, pickled)
    with pytest.raises(
        ValueError, match=rf"^adapter={pickled} cannot be read as tensors alone .*can run code"
    ) as caught:
        read(pickled)

    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not trace.exists()
    assert pickle.loads(pickle.dumps(Evil(trace))) == 0 and trace.exists()  # what it does to those who trust it


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<html>404</html>"),
        lambda path: path.write_bytes(bytes(200)),
        zipped,
        lambda path: torch.save([torch.ones(2)], path),
        lambda path: torch.save({"image_proj": {"latents": 3}}, path),
        lambda path: torch.save({"epoch": 3}, path),
    ],
    ids=["empty", "text", "zeros", "zip", "list", "number", "other"],
)
@pytest.mark.parametrize("read", [load_adapter, read_shapes])
def test_a_foreign_pickle_is_named(
    pickled: Path, write: Callable[[Path], object], read: Callable[[Path], object]
) -> None:
    write(pickled)
    with pytest.raises(ValueError, match=rf"^adapter={pickled} cannot be read as tensors alone .*is no adapter"):
        read(pickled)


def test_a_pickle_cut_short_is_named(pickled: Path) -> None:
    save_adapter(pickled, TENSORS, {})
    whole = pickled.read_bytes()
    for length in (5, 40, len(whole) // 2, len(whole) - 1):
        pickled.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"^adapter={pickled} cannot be read .*cut short"):
            load_adapter(pickled)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    for use in (load_adapter, read_metadata, lambda path: save_adapter(path, TENSORS, {})):
        with pytest.raises(ValueError, match=r"adapter\.pt: an adapter file ends with \.safetensors or \.bin"):
            use(tmp_path / "adapter.pt")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that cannot be forced to disk")
def test_a_folder_that_cannot_be_forced_to_disk_is_no_error() -> None:
    """As a mounted bucket, so that a file which is in its place already would be called not written."""
    fsync(Path("/proc"))
    with pytest.raises(UserError, match="Invalid argument"):
        fsync(Path("/proc/self/stat"))


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_permissions_are_what_the_umask_says(umask: int, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"adapter{ending}"
    for _ in range(2):  # a new file, and one that is replaced
        save_adapter(path, TENSORS, METADATA)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]
