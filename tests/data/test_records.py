"""What is read from one shard, whatever state it is in."""

import tarfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import DIRT, good, png, write_tar

from ipa.data.records import Record, read_shard
from ipa.data.rejects import Rejected


def read(shard: str, caption_key: str = "txt") -> tuple[list[str], Counter[str]]:
    found = list(read_shard(shard, caption_key))
    keys = [item.key for item in found if isinstance(item, Record)]
    return keys, Counter(item.reason for item in found if isinstance(item, Rejected))


def five(tmp_path: Path) -> tuple[Path, list[int]]:
    """A shard of five samples and where each ends."""
    path = Path(write_tar(tmp_path / "00000.tar", [m for i in range(5) for m in good(f"k{i}")]))
    with tarfile.open(path) as tar:
        starts = [info.offset for info in tar]
        end = tar.offset
    return path, [*starts[3::3], end]


def test_records_carry_name_index_and_caption(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "00007.tar", [*good("a", " a cat\n"), *good("b")])
    first, second = read_shard(shard, "txt")
    assert isinstance(first, Record) and isinstance(second, Record)
    assert (first.key, first.shard, first.index, first.caption) == ("a", "00007.tar", 0, "a cat")
    assert first.picture == png() and second.index == 1


def test_every_kind_of_dirt_has_its_reason(tmp_path: Path, dirty_members: list[tuple[str, bytes]]) -> None:
    keys, rejects = read(write_tar(tmp_path / "00000.tar", dirty_members))
    assert keys == ["good0", "bad1", "bad2", "good1", "good2", "bad5", "good3"]  # pictures are not looked at yet
    assert rejects == {reason: n for reason, n in DIRT.items() if reason not in ("broken picture", "too many pixels")}


def test_of_adjacent_doubles_the_first_counts(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "00000.tar", [*good("a", "first"), *good("a", "second"), *good("b")])
    found = [item.caption for item in read_shard(shard, "txt") if isinstance(item, Record)]
    assert found == ["first", "a thing"]
    assert read(shard)[1] == {"duplicate key": 1}


def test_caption_from_another_member_or_from_the_metadata(tmp_path: Path) -> None:
    members = [("a.json", b'{"alt": "from json"}'), ("a.blip", b"from blip"), ("a.png", png())]
    shard = write_tar(tmp_path / "00000.tar", members)
    assert [item.caption for item in read_shard(shard, "json.alt")] == ["from json"]
    assert [item.caption for item in read_shard(shard, "blip")] == ["from blip"]
    assert read(shard, "json.title") == ([], {"no caption": 1})


@pytest.mark.parametrize("metadata", [b"{", b"[1]"])
def test_broken_metadata(tmp_path: Path, metadata: bytes) -> None:
    shard = write_tar(tmp_path / "00000.tar", [("a.json", metadata), ("a.png", png())])
    assert read(shard, "json.alt") == ([], {"broken metadata": 1})


def test_tar_cut_off_inside_a_sample(tmp_path: Path) -> None:
    path, ends = five(tmp_path)
    path.write_bytes(path.read_bytes()[: ends[2] + 700])
    assert read(str(path)) == (["k0", "k1", "k2"], {"broken tar": 1})


def test_tar_cut_off_between_samples(tmp_path: Path) -> None:
    path, ends = five(tmp_path)
    path.write_bytes(path.read_bytes()[: ends[2]])
    assert read(str(path)) == (["k0", "k1", "k2"], {"broken tar": 1})


def test_tar_with_garbage_in_the_middle(tmp_path: Path) -> None:
    path, ends = five(tmp_path)
    data = bytearray(path.read_bytes())
    data[ends[1] : ends[1] + 1024] = b"\x7f" * 1024
    path.write_bytes(data)
    assert read(str(path)) == (["k0", "k1"], {"broken tar": 1})


@pytest.mark.parametrize("data", [b"", b"not a tar at all" * 100])
def test_no_tar_at_all(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "00000.tar"
    path.write_bytes(data)
    assert read(str(path)) == ([], {"broken tar": 1})


def test_s3_is_read_by_the_aws_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    five(tmp_path)
    program = tmp_path / "bin" / "aws"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1 $2" = "s3 cp" ] && exec cat "{tmp_path}/${{4##*/}}" 2>/dev/null\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert read("s3://bucket/laion/00000.tar") == ([f"k{i}" for i in range(5)], {})
    assert read("s3://bucket/laion/00001.tar") == ([], {"broken tar": 1})


def test_pipes_and_gzip(tmp_path: Path) -> None:
    path, _ = five(tmp_path)
    keys = [f"k{i}" for i in range(5)]
    assert read(f"pipe:cat {path}") == (keys, {})
    assert read(f"pipe:gzip -c {path}") == (keys, {})
    assert read(f"pipe:cat {path}.nowhere 2>/dev/null") == ([], {"broken tar": 1})
