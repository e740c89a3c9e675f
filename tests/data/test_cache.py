"""Feature shards: their bytes, and what is read from them."""

import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tars import Members, good, write_tar
from torch import Tensor

from ipa.data.addresses import Address, DropRates
from ipa.data.cache.format import CacheWriter, Header, WrongCache, pack, unpack
from ipa.data.cache.preparation import CachedPreparation
from ipa.data.cache.source import CacheSource
from ipa.data.records import Record
from ipa.data.rejects import Reason, Rejected

HEADER = Header("train", {"vae": "float32 1"}, {"crop": "center", "buckets": None}, {"image_size_px": 16})
CLOSING = "cache.closing.json"
DROPS = DropRates(0.2, 0.2, 0.2)


def make_record(index: int = 0, **changes: Any) -> Record:
    captions = (("a cat", 0.25), ("a red cat", 0.75))
    return replace(Record(f"{index:04d}", "00000.tar", index, b"", captions, measured=(30, 20)), **changes)


def make_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "mean_CHW": torch.randn(2, 3, 4, generator=generator),
        "logvar_CHW": torch.randn(2, 3, 4, generator=generator) - 20,
        "pooled_E": torch.randn(5, generator=generator),
        "reference_3HW": torch.randint(256, (3, 6, 6), generator=generator, dtype=torch.uint8),
        "text.ids": torch.arange(12).view(2, 6) + seed,
        "size_6": torch.tensor([20, 30, 0, 5, 16, 16]),
    }


def write_cache(path: Path, samples: int = 3, header: Header = HEADER) -> Path:
    """Also a sample that could not be decoded, at the end, and two that were not even that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = CacheWriter(file, header)
        for index in range(samples):
            writer.sample(make_record(index), make_tensors(index), None)
        writer.rejected(make_record(samples), Reason.BROKEN_PICTURE)
        writer.close({Reason.NO_PICTURE: 2, Reason.BROKEN_PICTURE: 1})
    return path


def members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def address(index: int = 0) -> Address:
    return Address(1, 0, "train", "00000.tar", index)


def test_a_sample_comes_back_in_the_types_of_the_format() -> None:
    tensors = make_tensors()
    about, arrays = unpack(pack(make_record(7), tensors, (16, 24)))

    assert (about["index"], about["size"], about["target"]) == (7, [30, 20], [16, 24])
    assert about["captions"] == [["a cat", 0.25], ["a red cat", 0.75]]
    halves = {name: tensors[name].half() for name in ("mean_CHW", "logvar_CHW", "pooled_E")}
    expected = {**tensors, **halves, "text.ids": tensors["text.ids"].int(), "size_6": tensors["size_6"].int()}
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert torch.equal(torch.from_numpy(array.copy()), expected[name]), name


def test_a_sample_is_a_safetensors_file_and_a_shard_a_plain_tar(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "00000.tar")
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
    loaded = safetensors.torch.load(dict(members(path))["0001.safetensors"])

    assert torch.equal(loaded["pooled_E"], make_tensors(1)["pooled_E"].half())
    names = ["cache.header.json", "0000.safetensors", "0001.safetensors", "0002.safetensors", "0003.rejected.json"]
    assert [info.name for info in infos] == [*names, "cache.closing.json"]
    assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in infos} == {(0, 0, 0, "", "")}
    assert json.loads(dict(members(path))["cache.header.json"])["choices"] == {"buckets": None, "crop": "center"}
    assert path.read_bytes() == write_cache(tmp_path / "again.tar").read_bytes()


def test_records_have_their_index_size_and_captions(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache/00000.tar")
    source = CacheSource.of(str(tmp_path / "cache"), weight=2)
    found = list(source.read(source.shards[0]))
    records = [each for each in found if isinstance(each, Record)]

    assert (source.name, source.weight, source.header) == ("train", 2.0, HEADER)
    assert [(r.key, r.shard, r.index, r.size) for r in records[:2]] == [
        ("0000", "00000.tar", 0, (30, 20)),
        ("0001", "00000.tar", 1, (30, 20)),
    ]
    assert records[0].captions == make_record().captions
    assert records[3].broken is not None and records[3].broken.reason == Reason.BROKEN_PICTURE
    assert [each.reason for each in found if isinstance(each, Rejected)] == [Reason.NO_PICTURE, Reason.NO_PICTURE]


@pytest.mark.parametrize("key", ["ünï-🙂", "folder/" * 30 + "0001", "0123456789" * 20])
def test_any_key_can_be_kept(key: str, tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    with path.open("wb") as file:
        writer = CacheWriter(file, HEADER)
        writer.sample(make_record(key=key), make_tensors(), None)
        writer.close({})
    (record,) = CacheSource.of(str(path)).read(str(path))

    assert isinstance(record, Record) and record.key == key


def test_a_shard_without_a_sound_closing_member_or_a_sample_is_broken(tmp_path: Path) -> None:
    whole = members(write_cache(tmp_path / "whole.tar"))
    damaged = [[*whole[:-1], (CLOSING, content)] for content in (b"", b"[]", b"{}", b"{'samples': 3}")]
    for parts in (whole[:2], whole[:5], whole[:2] + whole[3:], *damaged):
        path = write_tar(tmp_path / "00000.tar", parts)
        *found, last = CacheSource.of(path).read(path)

        assert not [each for each in found if isinstance(each, Rejected)]
        assert isinstance(last, Rejected) and last.reason == Reason.BROKEN_TAR and CLOSING in last.detail


def test_a_file_cut_anywhere_gives_its_first_samples_and_says_that_it_broke_off(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "00000.tar")
    whole = path.read_bytes()
    for cut in range(1500, len(whole) - 11_000, 700):
        path.write_bytes(whole[:cut])
        *found, last = CacheSource.of(str(path)).read(str(path))
        assert isinstance(last, Rejected) and last.reason == Reason.BROKEN_TAR
        assert [r.index for r in found if isinstance(r, Record)] == list(range(len(found)))


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:7], lambda b: b[:8] + b"x" + b[9:], lambda b: b[:-1], lambda b: b"\xff" * 8 + b[8:]],
)
def test_a_damaged_sample_is_rejected_and_the_others_are_not(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    changed = [
        (name, damage(content) if name == "0001.safetensors" else content)
        for name, content in members(write_cache(tmp_path / "whole.tar"))
    ]
    path = write_tar(tmp_path / "00000.tar", changed)
    good_ones, reasons = [], []
    for found in CacheSource.of(path).read(path):
        try:
            if isinstance(found, Rejected):
                raise found
            good_ones.append(CachedPreparation().sample(found, address()).record.key)
        except Rejected as reject:
            reasons.append(reject.reason)

    assert good_ones == ["0000", "0002"] and reasons.count(Reason.BROKEN_MEMBER) == 1


@pytest.mark.parametrize(
    ("first", "complaint"),
    [
        (good("0000")[0], "holds no features.*data=shards reads pictures"),
        (None, "00000.tar"),
        (("cache.header.json", b"{"), "is damaged"),
        (("cache.header.json", b'{"format": "something"}'), "holds no features"),
        (("cache.header.json", b'{"format": "ipa feature cache", "version": 7}'), "version 7 of the format, not 1"),
    ],
)
def test_other_tars_are_no_cache(first: tuple[str, bytes] | None, complaint: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", [first or ("x", b"")])
    if first is None:
        Path(path).write_bytes(b"<html>gone</html>" * 100)
    with pytest.raises(WrongCache, match=complaint):
        CacheSource.of(path)


def test_shards_that_were_made_in_another_way_are_refused(tmp_path: Path) -> None:
    """In one folder when they are read, of several folders at once."""
    write_cache(tmp_path / "a/00000.tar")
    other = replace(HEADER, choices={"crop": "center", "buckets": [[8, 8]]}, fingerprints={"vae": "bfloat16 2"})
    write_cache(tmp_path / "a/00001.tar", header=other)
    source = CacheSource.of(str(tmp_path / "a"))
    with pytest.raises(WrongCache, match=r"00001.tar .*buckets: \[\[8, 8\]\], here null; fingerprints vae: .*bfloat16"):
        list(source.read(source.shards[1]))
    write_cache(tmp_path / "b/00002.tar", header=other)
    with pytest.raises(WrongCache, match=r"b/00002.tar .*fingerprints vae"):
        CacheSource.of([str(tmp_path / "a"), str(tmp_path / "b")])


def test_a_fingerprint_covers_the_header_and_the_shards(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "a/00000.tar")
    other = write_cache(tmp_path / "b/00000.tar", header=replace(HEADER, fingerprints={"vae": "2"}))
    moved = write_cache(tmp_path / "c/00000.tar")
    more = [str(path), str(write_cache(tmp_path / "a/00001.tar"))]
    found = [CacheSource.of(each).fingerprint() for each in (str(path), str(other), str(moved), more)]

    assert found[0] == found[2] and len(set(found)) == 3


def test_batches_are_stacked_with_the_ids_of_the_chosen_captions() -> None:
    preparation = CachedPreparation(DROPS)
    samples = [
        preparation.sample(make_record(i, picture=pack(make_record(i), make_tensors(i), None)), address(i))
        for i in range(8)
    ]
    batch = preparation.batch(samples, [Rejected(Reason.NO_PICTURE)] * 2)
    chosen = [["a cat", "a red cat"].index(text) for text in batch.text]
    expected = torch.stack([make_tensors(i)["text.ids"][chosen[i]] for i in range(8)])

    assert set(chosen) == {0, 1}
    assert torch.equal(batch.text_inputs["ids"], expected) and batch.text_inputs["ids"].dtype == torch.int64
    assert torch.equal(batch.posterior.mean_BCHW, torch.stack([make_tensors(i)["mean_CHW"].half() for i in range(8)]))
    assert batch.features.pooled_BE.shape == (8, 5) and batch.reference_B3HW.shape == (8, 3, 6, 6)
    assert batch.size_B6[0].tolist() == [20, 30, 0, 5, 16, 16] and batch.image_B3HW is None
    assert batch.draws.noise_BCHW.shape == (8, 2, 3, 4) and batch.rejects == {Reason.NO_PICTURE: 2}
    batch.posterior.mean_BCHW += 1  # no view into bytes that others read


def test_a_sample_is_not_given_to_another_bucket() -> None:
    preparation = CachedPreparation()
    record = make_record(picture=pack(make_record(), make_tensors(), (16, 24)))

    assert preparation.sample(record, address(), (16, 24)).text
    for target in (None, (24, 16)):
        with pytest.raises(Rejected, match=Reason.OTHER_BUCKET):
            preparation.sample(record, address(), target)
    assert record.broken is None
