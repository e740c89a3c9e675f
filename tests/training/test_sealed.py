"""Sealed files: whole ones are read by every reader of torch's format, and nothing else passes for whole."""

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from ipa.errors import UserError
from ipa.training import sealed
from ipa.training.sealed import BrokenFile, check_seal, check_space, num_bytes, read_sealed, write_sealed

CONTENT = {"state_dict": {"weight": torch.arange(300.0)}, "step": 7, "lanes": [[0, 1], (2, "x")], "none": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_sealed(tmp_path / "step_7.ckpt", CONTENT)
    return tmp_path / "step_7.ckpt"


@pytest.mark.parametrize("read", [read_sealed, lambda path: torch.load(path, weights_only=True)], ids=["ours", "torch"])
def test_what_was_written_is_read(path: Path, read) -> None:
    content = read(path)

    assert torch.equal(content["state_dict"].pop("weight"), CONTENT["state_dict"]["weight"])
    assert content == {**CONTENT, "state_dict": {}}
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_was_cut_short_anywhere_is_told(path: Path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 1, 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenFile, match="cut short"):
            check_seal(path)


def test_one_changed_bit_anywhere_is_told(path: Path) -> None:
    whole, draw = path.read_bytes(), random.Random(0)
    for place in [*draw.sample(range(len(whole)), 200), *range(len(whole) - 80, len(whole))]:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        if place not in range(len(whole) - sealed.COMMENT_BYTES - 2, len(whole) - sealed.COMMENT_BYTES):
            with pytest.raises(BrokenFile):  # all but the length of the seal, which is what it is for zip readers alone
                check_seal(path)


def test_more_at_the_end_is_told(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BrokenFile):
        check_seal(path)


def test_a_file_of_something_else_is_told(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "plain.ckpt")
    with pytest.raises(BrokenFile, match="no seal"):
        read_sealed(tmp_path / "plain.ckpt")


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_a_sealed_pickle_runs_no_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write_sealed(tmp_path / "evil.ckpt", {"state_dict": Evil(trace)})

    with pytest.raises(BrokenFile, match="other things than tensors"):
        read_sealed(tmp_path / "evil.ckpt")
    assert not trace.exists()


def test_bytes_are_those_of_the_tensors() -> None:
    assert num_bytes(CONTENT) == 1200
    assert num_bytes({"a": [torch.zeros(3, dtype=torch.float16), {"b": torch.zeros(2)}], "c": "text"}) == 14


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step_1\.ckpt needs .* MB are free .*paths\.runs=FOLDER") as error:
        check_space(tmp_path / "checkpoints", 1 << 60, tmp_path / "checkpoints/step_1.ckpt")
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("looks_first", [True, False])
def test_a_disk_that_fills_up_leaves_what_was_there(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, looks_first: bool
) -> None:
    """Without the look at the free space, which another process may take in the next moment, it fails in the middle."""
    write_sealed(small_disk / "step_1.ckpt", {"weight": torch.ones(500_000)})
    if not looks_first:
        monkeypatch.setattr(sealed, "check_space", lambda *_: None)

    with pytest.raises(UserError, match="needs" if looks_first else r"could not write .*No space left.*unharmed"):
        write_sealed(small_disk / "step_2.ckpt", {"weight": torch.ones(900_000)})

    assert [path.name for path in small_disk.iterdir()] == ["step_1.ckpt"]
    assert torch.equal(read_sealed(small_disk / "step_1.ckpt")["weight"], torch.ones(500_000))
