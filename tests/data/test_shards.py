from pathlib import Path

import pytest

from ipa.data.shards.names import NoShards, expand_shards, shard_name
from ipa.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    for i in (1, 0, 2):
        (folder / f"{i:05d}.tar").touch()
        (folder / f"{i:05d}_stats.json").touch()
    return folder


def names(shards: list[str]) -> list[str]:
    return [Path(shard).name for shard in shards]


@pytest.mark.parametrize("spec", ["", "/", "/*.tar", "/0000*", "/{00000..00002}.tar"])
def test_ways_to_name_all_shards_of_a_folder(folder: Path, spec: str) -> None:
    assert names(expand_shards(f"{folder}{spec}")) == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_list_keeps_its_order(folder: Path) -> None:
    spec = [f"{folder}/00002.tar", f"{folder}/0000{{0,1}}.tar"]
    assert names(expand_shards(spec)) == ["00002.tar", "00000.tar", "00001.tar"]


def test_a_file_of_names(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "shards.txt"
    listed.write_text(f"\ufeff# two\n{folder}/0000{{0,2}}.tar\n\n 's3://bucket/{{7..8}}.tar' \n")
    assert names(expand_shards([str(listed), f"{folder}/00001.tar"])) == [
        *("00000.tar", "00002.tar", "7.tar", "8.tar", "00001.tar")
    ]
    listed.write_text("\n")
    with pytest.raises(NoShards, match=r"shards.txt is empty: it should name shards, one a line"):
        expand_shards(str(listed))
    listed.write_bytes("a.tar\ncafé.tar".encode("latin-1"))
    with pytest.raises(UserError, match=r"shards.txt is not UTF-8: byte 9 \(line 2\) is 0xe9"):
        expand_shards(str(listed))


@pytest.mark.parametrize("start", ["s3://bucket/", "https://host/", "pipe:cat /nowhere/"])
def test_remote_shards_are_passed_through(start: str) -> None:
    assert expand_shards(start + "{0..1}.tar", ["https", "s3", "pipe"]) == [start + "0.tar", start + "1.tar"]


def test_a_shell_may_use_its_own_patterns() -> None:
    command = "pipe:awk '{print}' /data/x*/{0..1}.tar"
    assert expand_shards(command, ["pipe"]) == [command.replace("{0..1}", n) for n in "01"]


def test_a_folder_may_be_named_like_a_pattern(folder: Path) -> None:
    folder.rename(folder.with_name("[a]*"))
    assert names(expand_shards(str(folder.with_name("[a]*")))) == ["00000.tar", "00001.tar", "00002.tar"]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("floppy://a.tar", r"cannot open 'floppy://a.tar': .*only of .*https.* s3"),
        ("s3://bucket/laion/", r"would have to be listed.* name each archive"),
        ("https://host/*.tar?x=1", r"would have to be listed.* name each archive"),
        ("s3://bucket/{00000.00009}.tar", r"would have to be listed.* name each archive"),
        ("FOLDER/0001.tar", "no such shard: 'FOLDER/0001.tar'.*FOLDER holds 00001.tar.*Give a folder"),
        ("FOLDER/../trian/*.tar", "trian does not exist. The folder .* holds train"),
        ("FOLDER/{00001..00004}.tar", "2 of the 4 shards of .* are missing: .*00003.tar, .*00004.tar"),
        ("FOLDER/../{00000..99999}.tar", "100000 of the 100000 shards"),  # by one listing
        ([], "the list of shards is empty"),
        (["", " "], "the list of shards is empty"),
        ("/x/{0..99999999999}.tar", "the braces"),
        ("/x/" + "{0..999}" * 4, "the braces"),
        ("{" * 500, "the braces"),
        ("https://x/\0.tar", "characters that no address has"),
    ],
)
def test_what_names_no_shards_is_refused_with_what_is_there(
    folder: Path, spec: str | list[str], complaint: str
) -> None:
    if isinstance(spec, str):
        spec = spec.replace("FOLDER/..", str(folder.parent)).replace("FOLDER", str(folder))
    with pytest.raises(NoShards, match=complaint.replace("FOLDER", str(folder))):
        expand_shards(spec)


@pytest.mark.parametrize(
    ("shard", "name"),
    [
        ("/data/laion/00001.tar", "00001.tar"),
        ("s3://bucket/laion/00001.tar", "00001.tar"),
        ("https://host/00001.tar?token=x/y", "00001.tar"),
        ("pipe:aws s3 cp s3://bucket/00001.tar -", "00001.tar -"),
    ],
)
def test_the_name_leaves_out_the_folders(shard: str, name: str) -> None:
    assert shard_name(shard) == name
