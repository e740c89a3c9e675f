"""The loop over an archive: it must find what Python's tarfile finds, and every break as well."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from tars import good, write_tar
from webdataset import TarWriter

from ipa.data.records import Record
from ipa.data.rejects import Rejected
from ipa.data.shards import source
from ipa.data.shards.source import Layout, read_shard
from ipa.data.shards.tar import BREAKS, Forward, Member, StrictTarInfo, read_members, uncompressed, walk

LONG = "folder/" + "a name of more than a hundred letters " * 4 + "0001.jpg"
NAMES = [
    "0001.jpg",
    "0001.txt",
    LONG,
    "ünïcode/0002.txt",
    "0003.ref.jpg",
    "n" * 100,
    "x" * 101,
    "p" * 90 + "/" + "q" * 90,
]


def archive(names: list[str] = NAMES, **options: object) -> bytes:
    """Members of 0, 1, 511, 512, 513, … bytes under these names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as tar:  # type: ignore[call-overload]
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = (0, 1, 511, 512, 513, 1200)[i % 6]
            tar.addfile(info, io.BytesIO(bytes([65 + i]) * info.size))
    return out.getvalue()


def written_by_webdataset() -> bytes:
    out = io.BytesIO()
    with TarWriter(out) as tar:
        for key in ("0001", "0002", "ü" * 60):
            tar.write({"__key__": key, "jpg": b"p" * 700, "txt": "a caption", "json": b"{}"})
    return out.getvalue()


def ours(data: bytes) -> tuple[list[tuple[str, bytes]], bool]:
    """What is found and not rejected, and whether it ends in a break."""
    found: list[tuple[str, bytes]] = []
    try:
        members = walk(uncompressed(Forward(io.BytesIO(data))))
        found += ((member.name, member.content) for member in members if isinstance(member, Member))
    except BREAKS:
        return found, True
    return found, False


def tarfiles(data: bytes) -> tuple[list[tuple[str, bytes]], bool]:
    """The same by tarfile's own stream, with headers that are not forgiven."""
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|*", tarinfo=StrictTarInfo) as tar:
            for info in tar:
                if (file := tar.extractfile(info)) and info.isreg():
                    found.append((info.name, file.read()))
    except BREAKS:
        return found, True
    return found, False


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS: dict[str, Callable[[], bytes]] = {
    "gnu": lambda: archive(format=tarfile.GNU_FORMAT),
    "pax": lambda: archive(format=tarfile.PAX_FORMAT),
    "ustar": lambda: archive([NAMES[0], NAMES[1], NAMES[5], NAMES[7]], format=tarfile.USTAR_FORMAT),
    "webdataset": written_by_webdataset,
    "a comment for all": lambda: archive(format=tarfile.PAX_FORMAT, pax_headers={"comment": "made today"}),
    "a name for all": lambda: archive(format=tarfile.PAX_FORMAT, pax_headers={"path": "0009.jpg"}),
    "empty": lambda: archive([]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_contents_are_those_of_tarfile(kind: str) -> None:
    found, broken = ours(KINDS[kind]())
    assert (found, broken) == tarfiles(KINDS[kind]())
    assert not broken and bool(found) == (kind != "empty")
    if kind in ("gnu", "pax"):  # long names too
        assert [name for name, _ in found] == NAMES


@pytest.mark.parametrize("kind", ["gnu", "pax", "ustar", "webdataset", "a comment for all"])
def test_wherever_it_is_cut_off_tarfile_finds_the_same(kind: str) -> None:
    whole = KINDS[kind]()
    end = whole.rstrip(b"\0").__len__()
    for length in {*range(0, end + 1024, 173), *range(0, end + 1025, 512), *range(1, end + 1025, 512)}:
        assert ours(whole[:length]) == tarfiles(whole[:length]), length


@pytest.mark.parametrize("kind", ["gnu", "pax", "webdataset"])
def test_wherever_it_is_damaged_tarfile_finds_the_same(kind: str) -> None:
    whole = KINDS[kind]()
    for at in range(0, len(whole.rstrip(b"\0")) + 1024, 61):
        damaged = whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :]
        assert ours(damaged) == tarfiles(damaged), at


def test_sparse_files_and_endless_sizes_are_breaks() -> None:
    sparse, endless = tarfile.TarInfo("0001.jpg"), tarfile.TarInfo("0002.jpg")
    sparse.pax_headers = {"GNU.sparse.size": "5", "GNU.sparse.numblocks": "0"}
    endless.size = 1 << 60  # asks for no memory
    assert ours(sparse.tobuf(tarfile.PAX_FORMAT) + bytes(1024)) == ([], True)
    assert ours(endless.tobuf(tarfile.GNU_FORMAT) + b"x" * 2000) == ([], True)


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"Z"])
def test_only_regular_files_count(kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        odd = tarfile.TarInfo("0001.jpg")
        odd.type, odd.linkname, odd.size = kind, "/etc/passwd", 700 if kind == b"Z" else 0
        tar.addfile(odd, io.BytesIO(b"z" * 700))
        tar.addfile(tarfile.TarInfo("0002.txt"))
    assert ours(out.getvalue()) == ([("0002.txt", b"")], False)


def test_archives_in_gzip_are_read_and_others_are_breaks() -> None:
    data = gzip.compress(archive())
    assert ours(data) == (ours(archive())[0], False) and ours(data[: len(data) // 2])[1]
    assert ours(bz2.compress(archive())) == ours(lzma.compress(archive())) == ([], True)


def test_names_are_split_at_the_first_dot_and_files_without_a_key_are_counted(tmp_path: Path) -> None:
    names = [
        "./x/0001.ref.JPG",
        "0001.txt",
        "README",
        ".hidden",
        "._0001.txt",
        "x/.DS_Store",
        "x/._0001.jpg",
        "x/.y.jpg",
    ]
    shard = write_tar(tmp_path / "00000.tar", [(name, name.encode()) for name in names])
    assert [member.name for member in read_members(shard)] == names
    found = [each for each in read_shard(shard, Layout(references=("ref.jpg",))) if isinstance(each, Rejected)]
    assert sorted(each.reason for each in found) == ["member without a key"] * 3 + ["no picture"] * 2
    assert {"README", ".hidden", "x/.y.jpg"} == {each.detail.split("'")[1] for each in found if "key" in each.reason}


def test_archives_one_after_the_other_are_read_on(tmp_path: Path) -> None:
    """As `cat` makes them: padded to records, or ended by two blocks of zeros only, with comments of their own."""
    padded, commented = KINDS["gnu"](), KINDS["a name for all"]()
    unpadded = padded[: -(-len(padded.rstrip(b"\0")) // 512) * 512] + bytes(1024)
    for parts in ((padded, padded), (unpadded, padded), (commented, padded, bytes(5000))):
        found, broken = ours(b"".join(parts))
        expected = [member for part in parts if part.strip(b"\0") for member in ours(part)[0]]
        assert found == expected and not broken


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_a_hole_of_zeros_is_a_break(blocks: int) -> None:
    whole = archive(["0001.jpg"] * 60)
    headers = [at for at in range(0, len(whole), 512) if whole[at : at + 8] == b"0001.jpg"]
    at = next(at for at in headers if at > 10240 and (at + blocks * 512) % 10240)
    found, broken = ours(whole[:at] + bytes(blocks * 512) + whole[at + blocks * 512 :])
    assert broken and 0 < len(found) < 60


def test_what_follows_an_archive_and_is_none_is_a_break() -> None:
    assert ours(archive() + b"x" * 600) == (ours(archive())[0], True)


def test_the_members_of_a_sample_are_bounded_as_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_SAMPLE_BYTES", 5000)
    members = [*good("a"), *[(f"b.{i}", bytes(900)) for i in range(5)], *good("b"), *good("c")]
    found = list(read_shard(write_tar(tmp_path / "00000.tar", members), Layout()))
    assert [each.key for each in found if isinstance(each, Record)] == ["a", "c"]
    assert {each.reason for each in found if isinstance(each, Rejected)} == {"too large a member", "no picture"}


def test_a_program_that_fails_late_loses_nothing_that_it_wrote(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "00000.tar", [(f"{i:04d}.txt", b"x" * 700) for i in range(9)])
    for _ in range(5):
        *found, end = read_members(f"pipe:cat {shard}; exit 3")
        assert len(found) == 9 and isinstance(end, Rejected) and "exit 3" in end.detail
        *found, end = read_members(f"pipe:head -c 5500 {shard}; exit 3")
        assert len(found) == 3 and isinstance(end, Rejected) and "cut off" in end.detail and "exit 3" in end.detail


def test_what_follows_the_end_of_an_archive_is_no_break(tmp_path: Path) -> None:
    shard = Path(write_tar(tmp_path / "00000.tar", [("0001.txt", b"x")]))
    shard.write_bytes(shard.read_bytes() + bytes(1 << 20))  # more than a pipe holds
    assert [member.name for member in read_members(f"pipe:cat {shard}")] == ["0001.txt"]


def test_leaving_a_program_in_the_middle_is_no_error(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "00000.tar", [(f"{i:04d}.bin", bytes(1 << 17)) for i in range(9)])
    members = read_members(f"pipe:cat {shard}")
    assert len(list(islice(members, 2))) == 2
    members.close()  # type: ignore[attr-defined]
