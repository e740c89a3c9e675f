"""What is read from one shard, whatever state it is in."""

import gc
import tarfile
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from dirt import Content
from tars import Members, good, png, write_tar

from ipa.data.records import Record
from ipa.data.rejects import Rejected
from ipa.data.shards.fields import Captions
from ipa.data.shards.filters import read_filters
from ipa.data.shards.source import Layout, read_shard

TEXT = Layout()


def read(shard: str, layout: Layout = TEXT) -> tuple[list[str], Counter[str]]:
    found = list(read_shard(shard, layout))
    keys = [item.key for item in found if isinstance(item, Record)]
    return keys, Counter(item.reason for item in found if isinstance(item, Rejected))


def records(tmp_path: Path, members: Members, layout: Layout = TEXT) -> list[Record]:
    """Those of a shard in which all is good."""
    found = list(read_shard(write_tar(tmp_path / "00000.tar", members), layout))
    assert not [item for item in found if isinstance(item, Rejected)]
    return [item for item in found if isinstance(item, Record)]


def five(tmp_path: Path) -> tuple[Path, list[int]]:
    """A shard of five samples and where each ends."""
    path = Path(write_tar(tmp_path / "00000.tar", [m for i in range(5) for m in good(f"k{i}")]))
    with tarfile.open(path) as tar:
        starts = [info.offset for info in tar]
        end = tar.offset
    return path, [*starts[3::3], end]


def test_records_carry_name_index_and_caption(tmp_path: Path) -> None:
    """Of adjacent doubles the first counts."""
    shard = write_tar(tmp_path / "00007.tar", [*good("a", " a cat\n"), *good("a", "a dog"), *good("b")])
    first, second = (item for item in read_shard(shard, TEXT) if isinstance(item, Record))
    assert read(shard)[1] == {"duplicate key": 1}
    assert (first.key, first.shard, first.index, first.captions) == ("a", "00007.tar", 0, (("a cat", 1.0),))
    assert first.picture == png() and second.index == 1 and first.references == ()


REFERENCES = Layout(references=("ref.jpg", "ref.png"))


def test_separate_references(tmp_path: Path) -> None:
    members = [*good("a"), ("a.ref.png", b"2"), ("a.REF.jpg", b"1"), *good("b"), ("b.ref.png", b"3"), ("b.x.png", b"4")]
    a, b = records(tmp_path, members, REFERENCES)
    assert (a.references, b.references) == ((b"1", b"2"), (b"3",)) and a.picture == b.picture == png()


def test_a_sample_without_any_reference_is_rejected(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "0.tar", [*good("a"), *good("b"), ("b.ref.png", png()), ("c.txt", b"x"), ("c.ref.png", b"")]
    )
    assert read(shard, REFERENCES) == (["b"], {"no reference": 1, "no picture": 1})


def test_filters_count_under_their_names_and_keep_the_numbers_of_the_rest(tmp_path: Path) -> None:
    scores = [b'{"p": 0.9}', b'{"p": 0.1}', b"{}", b'{"p": "0.2"}']
    members = [
        m for i, score in enumerate(scores) for m in [(f"{i}.json", score), (f"{i}.txt", b"x"), (f"{i}.png", png())]
    ]
    shard = write_tar(tmp_path / "0.tar", members)
    layout = Layout(filters=read_filters({"watermark": {"key": "json.p", "max": 0.5}}))
    assert read(shard, layout) == (["1", "3"], {"filter: watermark": 1, "filter: watermark is missing": 1})
    assert [item.index for item in read_shard(shard, layout) if isinstance(item, Record)] == [1, 3]


def test_what_is_dirty_by_itself_is_not_counted_as_filtered(dirty: tuple[str, Content]) -> None:
    shard, content = dirty
    layout = Layout(filters=read_filters({"small": {"key": "short_side_px", "min": 49}}))
    _, rejects = read(shard, layout)
    seen_later = {"broken picture", "too many pixels"}  # a cut-off picture still has its header
    assert all(rejects[reason] == n for reason, n in content.rejects.items() if reason not in seen_later)
    assert sum(rejects.values()) == len(content.good) + sum(content.rejects.values())
    assert rejects["filter: small"] >= len(content.good)


class Sample(dict[str, bytes]):
    """Members that can be seen to be gone."""


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"png": b"", "blip": b"x"}, None),
        ({"txt": b"x"}, "no picture"),
        ({"png": b"", "json": b"{"}, "broken metadata"),
        ({"png": b"<html>", "txt": b"x"}, "broken picture"),
        ({"png": png((4, 4)), "blip": b"x"}, "filter: small"),
    ],
)
def test_nothing_of_a_sample_stays_in_memory(members: dict[str, bytes], reason: str | None) -> None:
    filters = read_filters({"small": {"key": "short_side_px", "min": 9}} if reason else None)
    sample = Sample(members)
    gone = weakref.ref(sample)
    gc.disable()
    try:
        found = Layout(Captions.of(["json.alt", "txt", "blip"]), (), filters).try_record("a", "0.tar", 0, sample)
        del sample
        assert (found.reason if isinstance(found, Rejected) else None) == reason and gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda data, ends: data[: ends[2] + 700], 3),
        (lambda data, ends: data[: ends[2]], 3),
        (lambda data, ends: data[: ends[1]] + b"\x7f" * 1024 + data[ends[1] + 1024 :], 2),
    ],
    ids=["cut off inside a sample", "cut off between samples", "garbage in the middle"],
)
def test_a_broken_tar_gives_the_samples_before_the_break(tmp_path: Path, change: Callable[..., bytes], keys: int):
    path, ends = five(tmp_path)
    path.write_bytes(change(path.read_bytes(), ends))
    assert read(str(path)) == ([f"k{i}" for i in range(keys)], {"broken tar": 1})


@pytest.mark.parametrize("name", ["a.__bad__", "a.__key__", "a.__URL__"])
def test_a_name_that_webdataset_reserves_takes_no_sample_away(tmp_path: Path, name: str) -> None:
    shard = write_tar(tmp_path / "0.tar", [*good("a"), (name, b"x"), *good("b")])
    assert read(shard) == (["a", "b"], {"unsafe member": 1})


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
