"""Adapter files: written whole or not at all, and errors that name the file."""

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
from safetensors.torch import load_file, save_file

from ipa.errors import UserError
from ipa.export.storage import load_adapter, read_metadata, read_shapes, save_adapter
from ipa.files import fsync, write_atomically

TENSORS = {
    "image_proj.proj.weight": torch.arange(24, dtype=torch.float16).reshape(8, 3).T,  # not contiguous
    "ip_adapter.1.to_k_ip.weight": torch.ones(2, 4),
}
METADATA = {"base": "demo/base", "step": "1200", "note": "λ = 0,5"}
READERS = [load_adapter, read_metadata, read_shapes]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    return tmp_path / "adapter.bin"


def test_both_formats_give_back_tensors_and_shapes_and_one_the_metadata(path: Path, pickled: Path) -> None:
    for file in (path, pickled):
        save_adapter(file, TENSORS, METADATA)
        tensors, metadata = load_adapter(file)

        assert metadata == read_metadata(file) == (METADATA if file is path else {})
        assert tensors.keys() == TENSORS.keys()
        assert read_shapes(file) == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)
    content = torch.load(pickled, weights_only=True)
    assert {name: list(part) for name, part in content.items()} == {
        "image_proj": ["proj.weight"],
        "ip_adapter": ["1.to_k_ip.weight"],
    }


def test_a_file_of_others_without_metadata_is_read(path: Path) -> None:
    save_file({"a": torch.ones(2)}, path)

    assert load_adapter(path)[1] == {}


def test_shapes_are_read_without_a_tensor(path: Path) -> None:
    # the weights are of a type that torch cannot hold, so reading one of them fails
    entries = {"w": {"dtype": "F6_E2M3", "shape": [4, 8], "data_offsets": [0, 24]}, "__metadata__": {"step": "3"}}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))

    with pytest.raises(Exception, match="F6_E2M3"):
        load_file(path)
    assert read_shapes(path) == {"w": (4, 8)}
    assert read_metadata(path) == {"step": "3"}


def test_a_pickle_of_a_view_does_not_hold_the_whole_storage(pickled: Path) -> None:
    save_adapter(pickled, {"image_proj.latents": torch.zeros(1_000_000)[:10]}, {})

    assert pickled.stat().st_size < 10_000


def full_disk(temporary: Path) -> None:
    temporary.write_bytes(b"half of i")
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(temporary: Path) -> None:
    temporary.write_bytes(b"half of i")
    raise KeyboardInterrupt


def not_writing(temporary: Path) -> None:
    pass


def of_a_bug(temporary: Path) -> None:
    save_file({}, temporary, {"step": 3})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("write", "kind"),
    [(full_disk, UserError), (not_writing, UserError), (interrupted, KeyboardInterrupt), (of_a_bug, TypeError)],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(path: Path, write: Any, kind: Any) -> None:
    path.write_bytes(b"old")
    with pytest.raises(kind) as caught:
        write_atomically(path, write)

    if kind is UserError:
        assert all(word in str(caught.value) for word in (str(path), "free some space", "paths.runs"))
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_the_folder_is_created_or_the_reason_is_given(tmp_path: Path) -> None:
    save_adapter(tmp_path / "runs" / "x" / "adapter.safetensors", TENSORS, METADATA)
    assert [file.name for file in (tmp_path / "runs" / "x").iterdir()] == ["adapter.safetensors"]
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"could not write .*taken/adapter"):
        save_adapter(tmp_path / "taken" / "adapter.safetensors", TENSORS, METADATA)


@pytest.mark.parametrize("read", READERS)
def test_a_truncated_or_missing_file_is_named(path: Path, read: Callable[[Path], object]) -> None:
    save_adapter(path, TENSORS, METADATA)
    whole = path.read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"{path} is not a safetensors file .* truncated"):
            read(path)
    path.unlink()
    with pytest.raises(UserError, match=rf"adapter={path}: no such file"):
        read(path)
    with pytest.raises(UserError, match=rf"{path.parent}: .* adapter\.safetensors into its run folder"):
        read(path.parent)
    with pytest.raises(UserError, match=r"last\.ckpt: .* ipa\.tools\.export"):
        read(path.with_name("last.ckpt"))


class Evil:
    """An object that runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
@pytest.mark.parametrize("read", [load_adapter, read_shapes])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(
    pickled: Path, save: Callable[[Any, Path], None], read: Callable[[Path], object]
) -> None:
    trace = pickled.with_name("trace")
    save({"image_proj": {"proj.weight": torch.ones(2), "evil": Evil(trace)}, "ip_adapter": {}}, pickled)
    with pytest.raises(UserError, match=rf"^adapter={pickled} .*can run code") as caught:
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
def test_a_foreign_pickle_is_named(pickled: Path, write: Callable[[Path], object]) -> None:
    write(pickled)
    for read in (load_adapter, read_shapes):
        with pytest.raises(UserError, match=rf"^adapter={pickled} .*not an adapter"):
            read(pickled)


def test_a_truncated_pickle_is_named(pickled: Path) -> None:
    save_adapter(pickled, TENSORS, {})
    whole = pickled.read_bytes()
    for length in (5, 40, len(whole) // 2, len(whole) - 1):
        pickled.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"^adapter={pickled} .*truncated"):
            load_adapter(pickled)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    for use in (load_adapter, read_metadata, lambda path: save_adapter(path, TENSORS, {})):
        with pytest.raises(UserError, match=r"adapter\.pt: an adapter file ends with \.safetensors or \.bin"):
            use(tmp_path / "adapter.pt")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system without fsync")
def test_a_folder_without_fsync_is_no_error() -> None:
    """A mounted bucket is one: its file is in its place already, so the write succeeded."""
    fsync(Path("/proc"))
    with pytest.raises(OSError, match="Invalid argument"):
        fsync(Path("/proc/self/stat"))


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_permissions_follow_the_umask(umask: int, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"adapter{ending}"
    for _ in range(2):  # a new file, and one that is replaced
        save_adapter(path, TENSORS, METADATA)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]
