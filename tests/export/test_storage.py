"""Adapter files: written whole or not at all, and errors that name the file."""

import errno
import os
import pickle
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

from ipa.errors import UserError
from ipa.export.reading import read_adapter
from ipa.export.storage import load_adapter, save_adapter
from ipa.files import fsync, write_atomically

TENSORS = {
    "image_proj.proj.weight": torch.arange(24, dtype=torch.float16).reshape(8, 3).T,  # not contiguous
    "ip_adapter.1.to_k_ip.weight": torch.ones(2, 4),
}
METADATA = {"base": "demo/base", "step": "1200", "note": "λ = 0,5"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    return tmp_path / "adapter.bin"


def test_both_formats_give_back_the_tensors_and_one_the_metadata(path: Path, pickled: Path) -> None:
    for file in (path, pickled):
        save_adapter(file, TENSORS, METADATA)
        tensors, metadata = load_adapter(file)

        assert metadata == (METADATA if file is path else {})
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)
    content = torch.load(pickled, weights_only=True)
    assert {name: list(part) for name, part in content.items()} == {
        "image_proj": ["proj.weight"],
        "ip_adapter": ["1.to_k_ip.weight"],
    }
    save_adapter(pickled, {"image_proj.latents": torch.zeros(1_000_000)[:10]}, {})
    assert pickled.stat().st_size < 10_000  # a view does not bring its whole storage
    save_file({"a": torch.ones(2)}, path)  # as others publish them
    assert load_adapter(path)[1] == {}


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_the_same_content_has_the_same_bytes(ending: str, tmp_path: Path) -> None:
    """safetensors itself writes metadata in another order each time."""
    paths = [tmp_path / f"{number}{ending}" for number in range(8)]
    entries = [*METADATA.items(), ("quoted", '\x1f"\\\n\u2028')]
    for number, path in enumerate(paths):
        save_adapter(path, TENSORS, dict(entries[number % 4 :] + entries[: number % 4]))

    assert len({path.read_bytes() for path in paths}) == 1
    assert load_adapter(paths[0])[1] == (dict(entries) if ending == ".safetensors" else {})


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
        assert all(word in str(caught.value) for word in (str(path), "free some space"))
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_the_folder_is_created_or_the_reason_is_given(tmp_path: Path) -> None:
    save_adapter(tmp_path / "runs" / "x" / "adapter.safetensors", TENSORS, METADATA)
    assert [file.name for file in (tmp_path / "runs" / "x").iterdir()] == ["adapter.safetensors"]
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"could not write .*taken/adapter"):
        save_adapter(tmp_path / "taken" / "adapter.safetensors", TENSORS, METADATA)


def test_a_truncated_missing_or_misnamed_file_is_named(path: Path, pickled: Path) -> None:
    for file, words in ((path, "is not a safetensors file .* truncated"), (pickled, "truncated, not an adapter")):
        save_adapter(file, TENSORS, METADATA)
        whole = file.read_bytes()
        for length in (0, 5, 40, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(UserError, match=rf"adapter={file} .*{words}"):
                load_adapter(file)
        file.unlink()
        with pytest.raises(UserError, match=rf"adapter={file}: no such file"):
            load_adapter(file)
    with pytest.raises(UserError, match="adapter=runs/none: no such file or folder"):
        load_adapter(Path("runs/none"))
    with pytest.raises(UserError, match=rf"{path.parent}: .* adapter\.safetensors into its run folder"):
        load_adapter(path.parent)
    for use in (load_adapter, lambda path: save_adapter(path, TENSORS, {})):
        with pytest.raises(UserError, match=r"adapter\.onnx: an adapter file ends with \.safetensors"):
            use(path.with_suffix(".onnx"))
    assert list(path.parent.iterdir()) == []


def test_a_flipped_bit_of_a_checkpoint_is_found(pickled: Path) -> None:
    save_adapter(pickled, {"image_proj.latents": torch.full((1000,), 0.5)}, {})
    content = bytearray(pickled.read_bytes())
    content[content.index(torch.full((9,), 0.5).numpy().tobytes()) + 100] ^= 1
    pickled.with_suffix(".ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"adapter\.ckpt .*CRC-32"):
        load_adapter(pickled.with_suffix(".ckpt"))


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))], ids=["zip", "raw"]
)
def test_a_pickle_that_would_run_code_is_refused_and_does_not(pickled: Path, save: Callable[[Any, Path], None]) -> None:
    trace = pickled.with_name("trace")
    save({"image_proj": {"proj.weight": torch.ones(2), "evil": tiny.Harmful(trace)}, "ip_adapter": {}}, pickled)
    with pytest.raises(UserError, match=rf"^adapter={pickled} .*can run code") as caught:
        load_adapter(pickled)

    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not trace.exists()
    pickle.loads(pickle.dumps(tiny.Harmful(trace)))
    assert trace.exists()  # what it does to those who trust it


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("<html>404</html>"),
        lambda path: path.write_bytes(bytes(200)),
        zipped,
        lambda path: torch.save([torch.ones(2)], path),
        lambda path: torch.save({"image_proj": {"latents": 3}}, path),
        lambda path: torch.save({"epoch": 3}, path),
    ],
    ids=["text", "zeros", "zip", "list", "number", "other"],
)
def test_a_foreign_pickle_is_named(pickled: Path, write: Callable[[Path], object]) -> None:
    write(pickled)
    with pytest.raises(UserError, match=rf"{pickled} .*not an (IP-A|a)dapter"):
        read_adapter(pickled)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system without fsync")
def test_a_folder_without_fsync_is_no_error() -> None:
    """A mounted bucket is one: its file is in its place already, so the write succeeded."""
    fsync(Path("/proc"))
    with pytest.raises(OSError, match="Invalid argument"):
        fsync(Path("/proc/self/stat"))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_follow_the_umask(umask: int, path: Path, pickled: Path) -> None:
    before = os.umask(umask)
    try:
        for file in (path, pickled, path):  # new files, and one that is replaced
            save_adapter(file, TENSORS, METADATA)
            assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    finally:
        os.umask(before)
    assert sorted(path.parent.iterdir()) == [pickled, path]
