"""Untrusted files: they are read or refused with a message, nothing in them runs, nothing is written outside."""

import io
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import fuzz
import pytest
import torch
from tars import good, png, write_tar

from ipa.cli import refuse_pickles
from ipa.data.records import Record
from ipa.data.rejects import Reason, Rejected
from ipa.data.shards import tar as tar_module
from ipa.data.shards.names import NoShards, expand_shards
from ipa.data.shards.opening import close_shard, open_shard
from ipa.data.shards.source import Layout, read_shard
from ipa.data.shards.tar import Member, read_members
from ipa.families.sources import check_libraries

BY_HAND, MUTATED = 6, 2  # cases of each kind in the default suite


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Material:
    return fuzz.Material(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fuzz.ROOT)


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_valid_files_are_read(material: fuzz.Material, name: str) -> None:
    assert [outcome for outcome in fuzz.read_valid(material, fuzz.KINDS[name]) if outcome.word != "read"] == []


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_some_hostile_files(material: fuzz.Material, name: str) -> None:
    """Some made by hand, and some mutations; the slow test has the others."""
    kind = fuzz.KINDS[name]
    by_hand = len(material.by_hand(kind))
    chosen = [*range(0, by_hand, -(-by_hand // BY_HAND)), *range(by_hand, by_hand + MUTATED)]
    found = {number: fuzz.run_case(material, kind, number) for number in chosen}
    assert {number: case for number, case in found.items() if not case[1].good} == {}


@pytest.mark.slow
def test_many_hostile_files() -> None:
    outcomes = list(fuzz.cases(seed=1, number=510, names=list(fuzz.KINDS)))
    assert [case for case in outcomes if not case[3].good] == []
    assert len(outcomes) >= 500


def test_a_payload_would_leave_its_canary(material: fuzz.Material) -> None:
    """The payloads run where nothing stops them, or the tests above would mean nothing."""
    import pickle

    outcome = fuzz.in_a_process(
        lambda: pickle.loads(fuzz.pickles(material.canary)[0][1](fuzz.random.Random(0))), material.folder / "told.txt"
    )
    assert outcome.word == "read" and material.canary.exists()
    material.canary.unlink()


def test_libraries_that_ask_for_pickled_code_do_not_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "x.pth").write_bytes(fuzz.torch_file(fuzz.pickles(tmp_path / "canary")[0][1](fuzz.random.Random(0))))
    refuse_pickles()
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "x.pth", weights_only=False)
    assert not (tmp_path / "canary").exists()


def test_a_base_names_no_library_of_its_own() -> None:
    check_libraries({"unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None]}, "x", "base.path")
    with pytest.raises(ValueError, match=r"base.path=x says that its unet comes from evil, which would run code"):
        check_libraries({"unet": ["evil", "UNet"]}, "x", "base.path")


# archives


def odd_shard(path: Path) -> str:
    """Two good samples, with unsafe members between theirs."""
    odd = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE, "disk": tarfile.BLKTYPE}
    with tarfile.open(path, "w") as tar:
        for key in ("a", "b"):
            for name, content in good(key):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                for prefix in ("../", "/tmp/", "x/../../", "..\\"):
                    info.name = f"{prefix}{key}.jpg"
                    tar.addfile(info, io.BytesIO(content))
                for name, kind in odd.items():
                    special = tarfile.TarInfo(f"{key}.{name}")
                    special.type, special.linkname = kind, "/etc/passwd"
                    tar.addfile(special)
    return str(path)


def test_unsafe_members_are_counted_and_split_no_sample(tmp_path: Path) -> None:
    found = list(read_shard(odd_shard(tmp_path / "00000.tar"), Layout()))

    assert [(item.key, item.index) for item in found if isinstance(item, Record)] == [("a", 0), ("b", 1)]
    assert Counter(item.reason for item in found if isinstance(item, Rejected)) == {Reason.UNSAFE_MEMBER: 2 * 3 * 8}


def test_nothing_of_an_archive_is_written_to_disk(tmp_path: Path) -> None:
    """Recorded by an audit hook: files are only opened for reading."""
    shard = odd_shard(tmp_path / "00000.tar")
    opened: list[tuple[str, str]] = []
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("open", "os.mkdir", "os.symlink", "os.link", "os.rename"):
            opened.append((event, str(arguments[:2])))

    sys.addaudithook(hook)  # cannot be removed
    list(read_shard(shard, Layout()))
    watching = False

    assert opened == [("open", str((shard, "rb")))] or opened == [("open", str((shard, "r")))]


def test_members_above_the_size_limit_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_module, "MAX_MEMBER_BYTES", 5000)
    shard = write_tar(tmp_path / "00000.tar", [("a.jpg", bytes(5001)), ("a.txt", b"a"), *good("b")])
    found = list(read_members(shard))

    assert [each.reason for each in found if isinstance(each, Rejected)] == [Reason.TOO_LARGE]
    assert [each.name for each in found if isinstance(each, Member)] == ["a.txt", "b.json", "b.txt", "b.png"]


def test_a_pipe_with_the_name_of_a_shard_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "00000.tar")
    (end,) = read_members(str(tmp_path / "00000.tar"))
    assert isinstance(end, Rejected) and "no regular file" in end.detail


# addresses


@pytest.mark.parametrize("spec", ["pipe:cat a.tar", "http://host/0.tar", "ftps://host/0.tar", "ais://b/0.tar"])
def test_only_listed_schemes_are_opened(spec: str, tmp_path: Path) -> None:
    """Plain paths are a scheme as well."""
    scheme = spec.partition(":")[0]
    (tmp_path / "list.txt").write_text(spec)
    for given in (spec, str(tmp_path / "list.txt")):
        with pytest.raises(NoShards, match=rf"{scheme} is not among data.schemes=\[file,.*\] allows it"):
            expand_shards(given)
    assert expand_shards(spec, [scheme]) == [spec]
    for schemes, words in ((["https"], "file is not among"), (["gopher"], r"data.schemes=\['gopher'\]: give")):
        with pytest.raises(NoShards, match=words):
            expand_shards(write_tar(tmp_path / "0.tar", good("a")), schemes)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake curl, aws and gsutil that log their arguments and print an archive."""
    shard = write_tar(tmp_path / "archive.tar", [("a.png", png()), ("a.txt", b"a")])
    told = tmp_path / "told.txt"
    for name in ("curl", "aws", "gsutil", "ais"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nfor word; do echo "$word" >> {told}; done\ncat >> {told}\nexec cat {shard}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return told


@pytest.mark.parametrize("start", ["https://host/", "s3://bucket/", "gs://bucket/", "http://host/", "ais://bucket/"])
def test_a_name_is_no_command(start: str, programs: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    injections = ["$(touch {})", "`touch {}`", "';touch {};'", '";touch {};"', "|touch {}", "&touch {}"]
    for injected in injections:
        name = start + injected.format(canary) + ".tar"
        (shard,) = expand_shards(name, ["https", "http", "s3", "gs", "ais"])

        assert [member.name for member in read_members(shard)] == ["a.png", "a.txt"]
        assert not canary.exists()
        assert name in programs.read_text().replace('\\"', '"')


def test_an_address_adds_no_option_and_others_do_not_see_it(programs: Path) -> None:
    for address in ('https://host/0.tar"\noutput = "/tmp/x', "https://host/\x0b0.tar"):
        with pytest.raises(NoShards, match="characters that no address has"):
            expand_shards(address)
    close_shard(open_shard("https://host/0.tar?token=abc"))
    words, _, config = programs.read_text().partition("url = ")
    assert "token" not in words and config.startswith('"https://host/0.tar?token=abc"')
    assert "--proto\n=https\n" in words
