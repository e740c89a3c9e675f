"""`python -m ipa.tools.pack`: what training reads from the shards is what was in the folder."""

import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from composing import composed
from PIL import Image

from ipa.data.records import Record
from ipa.data.shards.source import ShardSource as Source
from ipa.tools.pack.__main__ import main

Pack = Callable[..., str]


@pytest.fixture
def pack(told: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pack:
    """Pack ``photos`` into ``out``; returns what it prints, or the message that ends it."""
    monkeypatch.chdir(tmp_path)
    return lambda out="out", **options: told(main, "photos", out, **{"workers": 1, **options})


def picture(path: Path, colour: object = "teal", size: tuple[int, int] = (12, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def captioned(path: Path, caption: str = "", **options: object) -> Path:
    picture(path, **options).with_suffix(".txt").write_text(caption or f"a {path.stem}\n")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty-three pictures with text files, sorted by what they show."""
    for i in range(23):
        captioned(tmp_path / f"photos/{'cats' if i < 12 else 'dogs'}/{i:02d}.png", f"number {i}", colour=(i, 0, 0))
    return tmp_path / "photos"


def records(out: Path | str, **layout: object) -> list[Record]:
    """What training reads; it must not reject anything."""
    source = Source.of("packed", shards=str(out), **layout)
    found = [record for shard in source.shards for record in source.read(shard)]
    assert all(isinstance(record, Record) for record in found), found
    return found


def by_name(out: Path | str, **layout: object) -> dict[str, Record]:
    """Stem of the picture's name → record; the number in front of it in the key is left out."""
    return {record.key.partition("_")[2]: record for record in records(out, **layout)}


def metadata(out: Path | str) -> dict[str, dict]:
    """Path in the folder → KEY.json."""
    entries = []
    for shard in sorted(Path(out).glob("*.tar")):
        with tarfile.open(shard) as tar:
            entries += [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    return {entry["file_name"]: entry for entry in entries}


def contents(out: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(out).iterdir())}


def test_what_is_read_is_what_was_there_in_img2datasets_layout(pack: Pack, photos: Path) -> None:
    (photos / "cats/00.txt").write_bytes("\ufeffnaïve\r\n".encode())
    said = pack(samples_per_shard=10, shuffle=False)

    read = by_name("out")
    assert len(read) == 23
    for path in photos.rglob("*.png"):
        record = read[f"{path.parent.name}_{path.stem}"]
        assert record.picture == path.read_bytes()
        assert record.captions == ((f"number {int(path.stem)}" if path.stem != "00" else "naïve", 1.0),)
    assert [name for name in contents("out") if name.endswith(".tar")] == ["00000.tar", "00001.tar", "00002.tar"]
    assert "captions: .txt files, for 23 of 23 pictures" in said and "out: 23 pictures, shards: 3, 0.1 MB" in said
    with tarfile.open("out/00000.tar") as tar:
        assert sorted(tar.getnames()[:3]) == [f"000000_cats_00.{kind}" for kind in ("json", "png", "txt")]
        assert {member.mtime for member in tar} == {0}
    assert metadata("out")["cats/01.png"] == {
        "key": "000001_cats_01",
        "status": "success",
        "caption": "number 1",
        "captions": ["number 1"],
        "file_name": "cats/01.png",
        **{"width": 12, "height": 8, "original_width": 12, "original_height": 8},
    }
    stats = json.loads(Path("out/00000_stats.json").read_text())
    counts = ("count", "successes", "failed_to_download", "failed_to_resize")
    assert [stats[name] for name in counts] == [10, 10, 0, 0]


def test_a_sorted_folder_is_shuffled_once_for_all(pack: Pack, photos: Path) -> None:
    pack("one")
    pack("two")
    pack("other", seed=1)
    pack("sorted", shuffle=False)

    orders = {out: [record.key for record in records(out)] for out in ("one", "two", "other", "sorted")}
    assert orders["one"] == orders["two"] and orders["sorted"] == sorted(orders["one"])
    assert len({tuple(order) for order in orders.values()}) == 3
    assert {key[7:11] for key in orders["one"][:8]} == {"cats", "dogs"}


def test_any_number_of_workers_writes_the_same_bytes(pack: Pack, photos: Path) -> None:
    (photos / "cats/00.png").write_bytes(b"broken")
    for out, workers in (("serial", 1), ("parallel", 2)):
        pack(out, workers=workers, samples_per_shard=7, size=4)

    assert contents("serial") == contents("parallel")


def test_packing_again_writes_only_what_is_missing(pack: Pack, photos: Path) -> None:
    """As after a kill: no archive but stats, half an archive under another name, and a shard that was not begun."""
    first = pack(samples_per_shard=6)
    before = {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    again = pack(samples_per_shard=6)

    assert "4 of 4 shards are there already" in again and first.splitlines()[-2:] == again.splitlines()[-2:]
    assert {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()} == before
    whole = contents("out")
    os.truncate("out/00001.tar", 1000)
    os.replace("out/00001.tar", "out/.00001.tar.4711.tmp")
    for name in ("00002.tar", "00002_stats.json"):
        Path("out", name).unlink()

    assert "2 of 4 shards are there already" in pack(samples_per_shard=6)
    assert contents("out") == whole


def test_what_was_packed_otherwise_is_overwritten_only_if_asked(pack: Pack, photos: Path) -> None:
    pack(samples_per_shard=10)
    before = contents("out")
    assert "samples_per_shard=10, now 5" in pack(samples_per_shard=5)
    (photos / "cats/01.txt").write_text("number I")
    assert "the folder has changed" in pack(samples_per_shard=10)
    for name in ("cats/00.txt", "dogs/22.png", "dogs/21.png", "dogs/20.png"):
        (photos / name).unlink()

    said = pack(samples_per_shard=10)
    assert "the folder has changed" in said
    assert "overwrite=true" in said and contents("out") == before

    pack(samples_per_shard=10, overwrite=True)
    assert len(records("out")) == 19 and sorted(contents("out"))[-2:] == ["00001_stats.json", "pack.json"]


def test_shards_of_others_are_left_alone_and_an_unwritable_folder_is_reported(pack: Pack, photos: Path) -> None:
    said = pack("photos/cats/00.png/out")
    assert "could not write photos/cats/00.png/out/" in said and "choose another folder with out=FOLDER" in said
    Path("out").mkdir()
    Path("out/00000.tar").write_bytes(b"precious")

    for overwrite in (False, True):
        assert "not packed here" in pack(overwrite=overwrite)
        assert contents("out") == {"00000.tar": b"precious"}


ODD = [
    *("é à.b c.jpg", "two.jpg", "two.png", "a/b.png", "a_b.png", "a.b.png", "日本/猫.PNG", "q'\"=\\.jpeg"),
    "line\nend.png",
    "x" * 120 + ".png",
]


def test_odd_names(pack: Pack, tmp_path: Path) -> None:
    for i, name in enumerate(ODD):
        captioned(tmp_path / "photos" / name, f"caption of {Path(name).stem}", colour=(i, 0, 0))
    os.mkfifo(tmp_path / "photos/pipe.png")
    picture(tmp_path / "photos/.hidden/x.png")
    captioned(Path(os.fsdecode(os.fsencode(tmp_path) + b"/photos/caf\xe9.png")), "undecodable")
    picture(Path(os.fsdecode(b"photos/\xff.png")))

    said = pack()

    named = metadata("out")
    read = {record.key: record for record in records("out")}
    assert len(named) == len(read) == len(ODD) + 1
    for name in ODD:
        record = read[named[name]["key"]]
        assert record.picture == (tmp_path / "photos" / name).read_bytes()
        assert record.captions[0][0] == f"caption of {Path(name).stem}"
    assert {"é à_b c", "日本_猫", "line_end", "caf_"} < set(by_name("out"))
    assert "left out, 1 × no caption: _.png" in said


def test_links_are_followed_but_not_in_circles(pack: Pack, photos: Path, tmp_path: Path) -> None:
    captioned(tmp_path / "elsewhere/far.png")
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    (photos / "cats/circle").symlink_to(photos)

    pack()
    assert len(records("out")) == 24 and "link/far.png" in metadata("out")


def test_what_cannot_be_used_is_counted_with_names(pack: Pack, photos: Path) -> None:
    (photos / "cats/00.png").write_bytes(b"<html>gone</html>")
    (photos / "cats/01.png").write_bytes(b"")
    (photos / "cats/02.txt").unlink()
    (photos / "cats/03.txt").write_text(" \n")
    (photos / "cats/04.txt").write_bytes(b"caf\xe9")
    (photos / "cats/05.pdf").touch()
    (photos / "cats/06.jpg").symlink_to("nowhere.jpg")
    picture(photos / "cats/._07.png")

    said = pack()

    assert len(records("out")) == 18
    assert "left out, 2 × broken picture: cats/00.png (it is a web page); cats/01.png (it is empty)" in said
    assert "left out, 3 × no caption: cats/02.png, cats/03.png, cats/04.png" in said
    assert "cats/04.txt is not UTF-8: byte 3 (line 1) is 0xe9" in said
    assert "1 × not a picture: cats/05.pdf" in said and "1 × link to nothing: cats/06.jpg" in said
    stats = json.loads(Path("out/00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_resize"]) == (20, 18, 2)
    assert stats["status_dict"] == {"success": 18, "broken picture": 2}


def table(path: Path, rows: list[dict]) -> None:
    """As JSON lines or CSV, whichever the ending says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8-sig")


@pytest.mark.parametrize("name", ["metadata.jsonl", "labels.csv"])
def test_captions_from_a_table(pack: Pack, tmp_path: Path, name: str) -> None:
    for stem in ("a", "b", "sub/cafe\u0301"):  # as file systems of macOS write an é
        picture(tmp_path / f"photos/{stem}.png")
    rows = [
        {"file_name": "a.png", "text": 'an "a", red', "score": 5.5, "likes": 3, "id": "007"},
        {"file_name": "./sub/caf\u00e9.png", "text": " the c ", "score": 4, "likes": -1, "id": "1_0"},
        {"file_name": "gone.png", "text": "x", "score": 1, "likes": 0, "id": "9"},
    ]
    rows = [
        {key: str(value).replace('"', '""') if name.endswith("csv") else value for key, value in row.items()}
        for row in rows
    ]
    table(tmp_path / "photos" / name, rows)

    said = pack(captions="null" if name.startswith("metadata") else name)

    assert {n: r.captions[0][0] for n, r in by_name("out").items()} == {"a": 'an "a", red', "sub_café": "the c"}
    entry = metadata("out")["a.png"]
    assert (float(entry["score"]), int(entry["likes"]), entry["id"]) == (5.5, 3, "007")
    assert len(records("out", filters={"good": {"key": "json.score", "min": 4}})) == 2
    assert f"{name}; 1 rows without a picture: gone.png, for 2 of 3 pictures" in said
    assert "left out, 1 × no caption: b.png" in said


def test_metadata_of_every_folder_and_several_captions(pack: Pack, tmp_path: Path) -> None:
    for stem in ("train/a", "train/deep/b", "test/c"):
        picture(tmp_path / f"photos/{stem}.png")
    table(
        tmp_path / "photos/train/metadata.jsonl",
        [
            {"file_name": "a.png", "caption": "first"},
            {"file_name": "deep/b.png", "caption": ["one", "two", ""]},
            {"file_name": "a.png", "caption": "second"},
        ],
    )
    table(tmp_path / "photos/test/metadata.jsonl", [{"file_name": "c.png", "caption": "alone", "width": 1}])

    pack()

    drawn = {name: record.captions for name, record in by_name("out", captions={"json.captions": 1}).items()}
    assert drawn == {
        "train_a": (("first", 0.5), ("second", 0.5)),
        "train_deep_b": (("one", 0.5), ("two", 0.5)),
        "test_c": (("alone", 1.0),),
    }
    assert {record.captions[0][0] for record in records("out")} == {"first", "one", "alone"}
    assert metadata("out")["test/c.png"]["width"] == 12


def test_columns_and_separators_of_a_csv(pack: Pack, photos: Path, tmp_path: Path) -> None:
    """A table elsewhere, with semicolons, its own column names and paths that start at the root."""
    lines = ["titel;bild;wert"] + [f'"ein; Bild {i}";{photos}/cats/{i:02d}.png;{"nan" if i else 1.5}' for i in range(3)]
    (tmp_path / "tabelle.csv").write_text("\n".join(lines))

    said = pack(captions="tabelle.csv", path_column="bild", caption_column="titel")

    assert {record.captions[0][0] for record in records("out")} == {f"ein; Bild {i}" for i in range(3)}
    assert [entry["wert"] for _, entry in sorted(metadata("out").items())] == ["1.5", "nan", "nan"]
    assert "left out, 20 × no caption" in said
    table(photos / "cats/labels.csv", [{"path": "05.png", "caption": "a five"}])  # its paths are relative to it
    for out, captions in (("one", "cats/labels.csv"), ("two", "./photos/cats/labels.csv")):
        pack(out, captions=captions)
        assert [record.captions[0][0] for record in records(out)] == ["a five"]


def test_parquet(pack: Pack, photos: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    rows = [{"image": "cats/00.png", "prompt": "from parquet", "score": float("nan"), "n": 3}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), photos / "table.parquet")

    pack(captions="table.parquet")
    assert [record.captions[0][0] for record in records("out")] == ["from parquet"]
    assert metadata("out")["cats/00.png"]["score"] is None


ROW = {"file_name": "cats/00.png", "text": "a"}


@pytest.mark.parametrize(
    ("tables", "options", "message"),
    [
        ({"metadata.jsonl": [ROW]}, {}, "2 sources of captions .txt, metadata.jsonl"),
        ({"m.jsonl": [{**ROW, "caption": "b"}]}, {"captions": "m.jsonl"}, "m.jsonl .*caption_column=.*text, caption"),
        ({"m.jsonl": [{"file_name": "a"}]}, {"captions": "m.jsonl"}, "m.jsonl .*caption_column=.*file_name"),
        ({"m.csv": [ROW]}, {"captions": "m.csv", "path_column": "bild"}, "path_column=bild.*file_name, text"),
        ({"m.csv": [{**ROW, "file_name": "x"}]}, {"captions": "m.csv"}, "paths: x; pictures: cats"),
        ({}, {"captions": "m.csv"}, "captions=m.csv: photos has 1 sources"),
        ({}, {"references": "nowhere"}, "references=nowhere: no such folder"),
        ({}, {"captions": "none"}, "23 × no caption"),
    ],
    ids=str,
)
def test_mistakes_are_reported_before_anything_is_written(
    pack: Pack, photos: Path, tables: dict[str, list[dict]], options: dict[str, object], message: str
) -> None:
    for name, rows in tables.items():
        table(photos / name, rows)

    assert re.search(message, pack(**options))
    assert not Path("out").exists()


def test_broken_tables_are_named(pack: Pack, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name, content, message in [
        ("m.jsonl", b'{"file_name": "a.png", "text": "x"}\n{', "m.jsonl cannot be read after row 1"),
        ("m.jsonl", b"[1]", "m.jsonl cannot be read after row 1: a row is not an object"),
        ("m.csv", b"file_name,text\na.png,caf\xe9\n", "m.csv cannot be read"),
        ("m.csv", b"file_name,text\na.png,b\na.png,b,c\n", "line 3 does not fit the columns file_name, text"),
        ("m.csv", b"", "m.csv: no row names a picture"),
        ("m.parquet", b"PAR1", "pip install pyarrow"),
    ]:
        (photos / name).write_bytes(content)
        assert message in pack(captions=name)


def test_folders_without_pictures_and_missing_captions(pack: Pack, tmp_path: Path) -> None:
    assert "folder=photos: no such folder" in pack()
    (tmp_path / "photos").mkdir()
    assert "folder=photos has no pictures" in pack()
    picture(tmp_path / "photos/a.png")
    said = pack()
    assert "photos has 0 sources of captions" in said and "missing_caption=empty" in said
    assert "captions: none" in pack("one", missing_caption="empty")
    captioned(tmp_path / "photos/b.png")
    assert "1 × no caption: a.png; missing_caption=skip" in pack(missing_caption="error")
    assert not Path("out").exists()
    assert "for 1 of 2 pictures" in pack(missing_caption="empty")
    assert metadata("out")["a.png"]["caption"] == ""


def test_references_make_paired_data(pack: Pack, photos: Path, tmp_path: Path) -> None:
    for i in range(22):
        folder = "cats" if i < 12 else "dogs"
        picture(tmp_path / f"before/{folder}/{i:02d}.{'jpg' if i % 2 else 'webp'}", colour=(0, i, 0))

    said = pack(references="before", samples_per_shard=10)

    read = by_name("out", reference=["ref.jpg", "ref.webp"])
    assert len(read) == 22 and "left out, 1 × no reference: dogs/22.png" in said
    assert read["cats_03"].references == ((tmp_path / "before/cats/03.jpg").read_bytes(),)
    assert read["cats_03"].picture == (photos / "cats/03.png").read_bytes()
    command = said.splitlines()[-1].removeprefix("next: ")
    assert command.endswith("data.train=out 'data.reference=[ref.jpg,ref.webp]'")


def test_references_inside_the_folder_and_of_other_names(pack: Pack, photos: Path, tmp_path: Path) -> None:
    """The former are not packed themselves."""
    picture(photos / "refs/cats/00.png", colour="red")
    pack("inside", references="photos/refs")
    assert list(by_name("inside", reference="ref.png")) == ["cats_00"]
    shutil.rmtree(photos / "refs")

    picture(tmp_path / "before/x.png")
    assert "23 × no reference: cats/00.png" in pack(references="before")
    picture(tmp_path / "before/x.jpg")
    assert "references=before has several pictures of one name" in pack(references="before")


def test_larger_pictures_are_shrunk(pack: Pack, tmp_path: Path) -> None:
    captioned(tmp_path / "photos/small.png", size=(40, 20))
    captioned(tmp_path / "photos/wide.png", size=(201, 67), colour="red")
    captioned(tmp_path / "photos/clear.png", size=(50, 90), colour=(200, 0, 0, 90), mode="RGBA")
    captioned(tmp_path / "photos/grey.jpg", size=(500, 400), colour=77, mode="L")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (300, 100), "blue").save(captioned(tmp_path / "photos/turned.jpg"), exif=turned)

    pack(size=20)

    named = {Path(name).stem: entry for name, entry in metadata("out").items()}
    sizes = {"small": (40, 20), "wide": (60, 20), "clear": (20, 36), "grey": (25, 20), "turned": (20, 60)}
    assert {name: (entry["width"], entry["height"]) for name, entry in named.items()} == sizes
    assert (named["turned"]["original_width"], named["turned"]["original_height"]) == (100, 300)
    read = by_name("out")
    assert read["small"].picture == (tmp_path / "photos/small.png").read_bytes()
    for key, kind in (("wide", "JPEG"), ("grey", "JPEG"), ("turned", "JPEG"), ("clear", "WEBP")):
        with Image.open(io.BytesIO(read[key].picture)) as opened:
            assert opened.format == kind and opened.size == sizes[key]
    with Image.open(io.BytesIO(read["clear"].picture)) as opened:
        red, *others = opened.convert("RGBA").getpixel((10, 10))
        assert abs(red - 200) <= 1 and others == [0, 0, 90]  # colours are resized weighted by their alpha


@pytest.mark.parametrize("size", ["null", 50])
def test_what_training_would_reject_is_not_packed(pack: Pack, photos: Path, size: object) -> None:
    """Truncated behind a sound header, small enough to be copied or not."""
    for name in ("cats/00.png", "cats/01.jpg", "cats/02.webp"):
        path = captioned(photos / name, size=(400, 300), colour=(9, 99, 200))
        path.write_bytes(path.read_bytes()[:-40])

    assert "left out, 3 × broken picture: cats/0" in pack(size=size)


@pytest.mark.parametrize("out", ["my shards", "a=b,[c]", "ünï/a.b-c"])
def test_the_next_command_can_be_run(pack: Pack, photos: Path, out: str) -> None:
    said = pack(out if "=" not in out else f"./{out}")
    words = shlex.split(said.splitlines()[-1].removeprefix("next: python train.py "))

    assert len(records(composed("train", *words).data.train)) == 23
