"""`python -m ipa.tools.pack`: what training reads from the shards is what lay in the folder."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from ipa.data.captions import read_texts
from ipa.data.fields import Fields
from ipa.data.records import Record
from ipa.data.sources import Source
from ipa.data.transforms import open_picture
from ipa.tools.pack import main

ROOT = Path(__file__).resolve().parents[2]

Pack = Callable[..., str]


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Pack:
    """Pack ``photos`` into ``out`` in this process; returns what it says, or the message that ends it."""
    monkeypatch.chdir(tmp_path)

    def run(out: str = "out", **options: object) -> str:
        words = [f"{name}={value}" for name, value in {"workers": 1, **options}.items()]
        monkeypatch.setattr(sys, "argv", ["pack", "photos", out, *words])
        capsys.readouterr()
        try:
            main()
            return capsys.readouterr().out
        except SystemExit as end:
            return str(end.code)

    return run


def picture(path: Path, colour: object = "teal", size: tuple[int, int] = (12, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def captioned(path: Path, caption: str = "", **options: object) -> Path:
    picture(path, **options).with_suffix(".txt").write_text(caption or f"a {path.stem}\n")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty-three pictures with text files beside them, sorted by what they show."""
    for i in range(23):
        captioned(tmp_path / f"photos/{'cats' if i < 12 else 'dogs'}/{i:02d}.png", f"number {i}", colour=(i, 0, 0))
    return tmp_path / "photos"


def records(out: Path | str, **layout: object) -> list[Record]:
    """What training reads; it must not reject anything."""
    source = Source.of("packed", shards=str(out), **layout)
    found = [record for shard in source.shards for record in source.read(shard)]
    assert all(isinstance(record, Record) for record in found), found
    return found


def metadata(out: Path | str) -> dict[str, dict]:
    """Path in the folder → KEY.json."""
    entries = []
    for shard in sorted(Path(out).glob("*.tar")):
        with tarfile.open(shard) as tar:
            entries += [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    return {entry["file_name"]: entry for entry in entries}


def contents(out: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(out).iterdir())}


def test_what_is_read_is_what_lay_there(pack: Pack, photos: Path) -> None:
    said = pack(samples_per_shard=10)

    read = {record.key: record for record in records("out")}
    assert len(read) == 23
    for path in photos.rglob("*.png"):
        record = read[f"{path.parent.name}_{path.stem}"]
        assert record.picture == path.read_bytes()
        assert record.captions == ((f"number {int(path.stem)}", 1.0),)
    assert [Path(name).name for name in contents("out") if name.endswith(".tar")] == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
    ]
    assert "captions: .txt files, beside 23 of 23 pictures" in said and "out: 23 pictures, shards: 3, 0.1 MB" in said
    assert said.endswith("next: python train.py experiment=decoupled_global recipe=sd15 data.train=out\n")


def test_layout_and_stats_are_img2datasets(pack: Pack, photos: Path) -> None:
    pack(shuffle=False)

    with tarfile.open("out/00000.tar") as tar:
        assert tar.getnames()[:3] == ["cats_00.json", "cats_00.txt", "cats_00.png"]
        assert {member.mtime for member in tar} == {0}
    assert metadata("out")["cats/00.png"] == {
        "key": "cats_00",
        "status": "success",
        "caption": "number 0",
        "file_name": "cats/00.png",
        **{"width": 12, "height": 8, "original_width": 12, "original_height": 8},
    }
    stats = json.loads(Path("out/00000_stats.json").read_text())
    assert list(stats)[:5] == ["count", "successes", "failed_to_download", "failed_to_resize", "status_dict"]
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (23, 23, 0)


def test_a_sorted_folder_is_shuffled_once_for_all(pack: Pack, photos: Path) -> None:
    pack("one")
    pack("two")
    pack("other", seed=1)
    pack("sorted", shuffle=False)

    orders = {out: [record.key for record in records(out)] for out in ("one", "two", "other", "sorted")}
    assert orders["one"] == orders["two"] and orders["sorted"] == sorted(orders["one"])
    assert len({tuple(order) for order in orders.values()}) == 3
    assert {key[:4] for key in orders["one"][:8]} == {"cats", "dogs"}


@pytest.mark.parametrize("options", [{}, {"size": 4}], ids=["copied", "shrunk"])
def test_any_number_of_workers_writes_the_same_bytes(pack: Pack, photos: Path, options: dict[str, int]) -> None:
    (photos / "cats/00.png").write_bytes(b"broken")
    for out, workers in (("serial", 1), ("parallel", 3), ("threads", 9)):
        pack(out, workers=workers, samples_per_shard=7, **options)

    assert contents("serial") == contents("parallel") == contents("threads")


def test_packing_again_writes_nothing(pack: Pack, photos: Path) -> None:
    first = pack(samples_per_shard=10)
    before = {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()}

    again = pack(samples_per_shard=10)

    assert "3 of 3 shards are there already" in again
    assert {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()} == before
    assert first.splitlines()[-2:] == again.splitlines()[-2:]


def test_what_a_kill_leaves_is_completed(pack: Pack, photos: Path) -> None:
    """No archive but stats, half an archive under another name, and a shard that was not begun."""
    pack(samples_per_shard=6)
    whole = contents("out")
    os.truncate("out/00001.tar", 1000)
    os.replace("out/00001.tar", "out/.00001.tar.4711.tmp")
    for name in ("00002.tar", "00002_stats.json"):
        Path("out", name).unlink()

    assert "2 of 4 shards are there already" in pack(samples_per_shard=6)
    assert contents("out") == whole


def test_a_kill_at_any_moment_spoils_nothing(pack: Pack, photos: Path) -> None:
    pack("whole", samples_per_shard=2, size=4)
    command = [sys.executable, "-m", "ipa.tools.pack", "photos", "out", "samples_per_shard=2", "size=4", "workers=2"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    while not list(Path("out").glob("*.tar")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()

    for shard in Path("out").glob("*.tar"):
        assert shard.read_bytes() == Path("whole", shard.name).read_bytes()
    said = pack(samples_per_shard=2, size=4)

    assert "are there already" in said
    assert contents("out") == contents("whole")


def test_a_changed_folder_is_told_and_overwritten_only_if_asked(pack: Pack, photos: Path) -> None:
    pack(samples_per_shard=10)
    before = contents("out")
    for name in ("cats/00.txt", "dogs/22.png", "dogs/21.png", "dogs/20.png"):
        (photos / name).unlink()

    said = pack(samples_per_shard=10)
    assert "3 of the 3 shards in out=out were packed of other files: the folder has changed since" in said
    assert "overwrite=true" in said and contents("out") == before

    pack(samples_per_shard=10, overwrite=True)
    assert len(records("out")) == 19 and sorted(contents("out"))[-1] == "00001_stats.json"


def test_a_corrected_caption_is_a_change(pack: Pack, photos: Path) -> None:
    pack()
    (photos / "cats/00.txt").write_text("number O")

    assert "the folder has changed since" in pack()


def test_other_options_are_told(pack: Pack, photos: Path) -> None:
    pack(samples_per_shard=10)

    assert "with other options (samples_per_shard=10 then, 5 now)" in pack(samples_per_shard=5)
    assert "(size=None then, 4 now)" in pack(samples_per_shard=10, size=4)


@pytest.mark.parametrize("overwrite", [False, True])
def test_shards_of_others_are_left_alone(pack: Pack, photos: Path, overwrite: bool) -> None:
    Path("out").mkdir()
    Path("out/00000.tar").write_bytes(b"precious")

    assert "not packed here, 1 (00000.tar)" in pack(overwrite=overwrite)
    assert contents("out") == {"00000.tar": b"precious"}


ODD = [
    "é à.b c.jpg",
    "two.jpg",
    "two.png",
    "a/b.png",
    "a_b.png",
    "a.b.png",
    "日本/猫.PNG",
    "q'\"=\\.jpeg",
    "line\nend.png",
]


def test_odd_names(pack: Pack, tmp_path: Path) -> None:
    for i, name in enumerate(ODD):
        captioned(tmp_path / "photos" / name, f"caption of {Path(name).stem}", colour=(i, 0, 0))
    os.mkfifo(tmp_path / "photos/pipe.png")
    picture(tmp_path / "photos/.hidden/x.png")

    said = pack()

    named = metadata("out")
    read = {record.key: record for record in records("out")}
    assert set(named) == set(ODD) and len(read) == len(ODD)
    for name in ODD:
        record = read[named[name]["key"]]
        assert record.picture == (tmp_path / "photos" / name).read_bytes()
        assert record.captions[0][0] == f"caption of {Path(name).stem}"
    assert {"é à_b c", "日本_猫", "line_end"} < set(read)
    assert "told apart by a number: 5 (a.b.png is a_b_" in said


def test_a_name_that_is_no_text(pack: Pack, photos: Path) -> None:
    (photos / "cats/00.png").rename(os.fsdecode(os.fsencode(photos) + b"/cats/caf\xe9.png"))
    (photos / "cats/00.txt").rename(os.fsdecode(os.fsencode(photos) + b"/cats/caf\xe9.txt"))
    picture(Path(os.fsdecode(b"photos/\xff.png")))

    assert "left out, no caption: 1 (_.png)" in pack()
    assert "cats_caf_" in {record.key for record in records("out")}


def test_names_are_stable(pack: Pack, photos: Path) -> None:
    """Keys depend on nothing but the name, so more pictures do not rename those that are there."""
    captioned(photos / "two.png")
    captioned(photos / "two.jpg")
    pack("before")
    captioned(photos / "more.png")
    pack("after")

    before, after = metadata("before"), metadata("after")
    assert {name: after[name]["key"] for name in before} == {name: entry["key"] for name, entry in before.items()}


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
    (photos / "cats/05.heic").touch()

    said = pack()

    assert len(records("out")) == 18
    assert "left out, broken picture: 2 (cats/00.png, cats/01.png)" in said
    assert "left out, no caption: 1 (cats/02.png)" in said
    assert "left out, empty caption: 1 (cats/03.png)" in said
    assert "left out, caption is not UTF-8: 1 (cats/04.png)" in said
    assert "kinds that are not read, make them JPEG or PNG: 1 (cats/05.heic)" in said
    stats = json.loads(Path("out/00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (20, 18, 2)
    assert stats["status_dict"] == {"success": 18, "broken picture": 2}
    assert sorted(stats["failed"]["broken picture"]) == ["cats/00.png", "cats/01.png"]


def test_missing_captions(pack: Pack, photos: Path) -> None:
    (photos / "cats/00.txt").unlink()

    assert "pack: no caption: 1 (cats/00.png). missing_caption=skip" in pack(missing_caption="error")
    assert not Path("out").exists()
    assert "packed without caption: 1 (cats/00.png)" in pack(missing_caption="empty")
    assert metadata("out")["cats/00.png"]["caption"] == ""
    assert "missing_caption=never: give one of skip, empty, error" in pack(missing_caption="never")


def table(path: Path, rows: list[dict]) -> None:
    """As JSON lines or CSV, whichever the ending says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8-sig")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "labels.csv"])
def test_captions_from_a_table(pack: Pack, tmp_path: Path, name: str) -> None:
    for stem in ("a", "b", "sub/c"):
        picture(tmp_path / f"photos/{stem}.png")
    rows = [
        {"file_name": "a.png", "text": 'an "a", red', "score": 5.5, "likes": 3, "id": "007"},
        {"file_name": "./sub/c.png", "text": " the c ", "score": 4, "likes": -1, "id": "1_0"},
        {"file_name": "gone.png", "text": "x", "score": 1, "likes": 0, "id": "9"},
    ]
    rows = [
        {key: str(value).replace('"', '""') if name.endswith("csv") else value for key, value in row.items()}
        for row in rows
    ]
    table(tmp_path / "photos" / name, rows)

    said = pack(captions="null" if name.startswith("metadata") else name)

    assert {r.key: r.captions[0][0] for r in records("out")} == {"a": 'an "a", red', "sub_c": "the c"}
    entry = metadata("out")["a.png"]
    assert (entry["score"], entry["likes"], entry["id"]) == (5.5, 3, "007")
    assert len(records("out", filters={"good": {"key": "json.score", "min": 4}})) == 2
    assert f"{name}, columns file_name and text, for 2 of 3 pictures" in said
    assert "for filters: score, likes, id" in said
    assert "rows without a picture: 1 (gone.png)" in said and "left out, no caption: 1 (b.png)" in said


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

    said = pack()

    drawn = {record.key: record.captions for record in records("out", captions={"json.captions": 1})}
    assert drawn == {
        "train_a": (("first", 0.5), ("second", 0.5)),
        "train_deep_b": (("one", 0.5), ("two", 0.5)),
        "test_c": (("alone", 1.0),),
    }
    assert {record.captions[0][0] for record in records("out")} == {"first", "one", "alone"}
    assert metadata("out")["test/c.png"]["width"] == 12
    assert "several captions for 2 pictures" in said and "and 1 more of this name" in said


def test_columns_and_separators_of_a_csv(pack: Pack, photos: Path, tmp_path: Path) -> None:
    """A table elsewhere, with semicolons, its own column names and paths that start at the root."""
    lines = ["titel;bild;wert"] + [f'"ein; Bild {i}";{photos}/cats/{i:02d}.png;{"nan" if i else 1.5}' for i in range(3)]
    (tmp_path / "tabelle.csv").write_text("\n".join(lines))

    said = pack(captions="tabelle.csv", path_column="bild", caption_column="titel")

    assert {record.captions[0][0] for record in records("out")} == {f"ein; Bild {i}" for i in range(3)}
    assert [entry["wert"] for _, entry in sorted(metadata("out").items())] == [1.5, None, None]
    assert "columns bild and titel" in said and "left out, no caption: 20" in said


def test_names_in_the_other_unicode_form(pack: Pack, tmp_path: Path) -> None:
    picture(tmp_path / "photos/cafe\u0301.png")
    table(tmp_path / "photos/metadata.jsonl", [{"file_name": "caf\u00e9.png", "text": "a café"}])

    pack()
    assert [record.captions[0][0] for record in records("out")] == ["a café"]


def test_parquet(pack: Pack, photos: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    rows = [{"image": "cats/00.png", "prompt": "from parquet", "score": float("nan"), "n": 3}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), photos / "table.parquet")

    pack(captions="table.parquet")
    assert [record.captions[0][0] for record in records("out")] == ["from parquet"]
    assert metadata("out")["cats/00.png"]["score"] is None


def test_parquet_without_pyarrow_says_how_to_get_it(pack: Pack, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)

    assert "in 2 places, txt, metadata.parquet" in pack()
    assert "parquet needs pyarrow. Install it (pip install pyarrow)" in pack(captions="metadata.parquet")


ROW = {"file_name": "cats/00.png", "text": "a"}


@pytest.mark.parametrize(
    ("tables", "options", "message"),
    [
        ({"metadata.jsonl": [ROW]}, {}, "captions in 2 places, txt, metadata.jsonl: give captions=txt or captions=met"),
        ({"some.csv": [ROW]}, {}, "captions in 2 places, txt, some.csv"),
        (
            {"m.jsonl": [{**ROW, "caption": "b"}]},
            {"captions": "m.jsonl"},
            "several of text, caption, prompt .* caption_c",
        ),
        (
            {"m.jsonl": [{"file_name": "a"}]},
            {"captions": "m.jsonl"},
            "none of text, .* columns file_name. Say caption_c",
        ),
        (
            {"m.csv": [ROW]},
            {"captions": "m.csv", "path_column": "bild"},
            "path_column=bild: .* columns file_name, text",
        ),
        ({"m.csv": [{**ROW, "file_name": "x"}]}, {"captions": "m.csv"}, r"names none of the pictures: it says 1 \(x\)"),
        ({}, {"captions": "m.csv"}, "captions=m.csv: no such file, neither here nor in photos"),
        ({}, {"captions": "tags"}, "captions=tags: neither txt, nor none, nor a table"),
        ({}, {"size": 0}, "size=0: give .*at least 1"),
        ({}, {"references": "nowhere"}, "references=nowhere: no such folder"),
        ({}, {"captions": "none"}, "no picture is left to be packed. no caption: 23"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_written(
    pack: Pack, photos: Path, tables: dict[str, list[dict]], options: dict[str, object], message: str
) -> None:
    for name, rows in tables.items():
        table(photos / name, rows)

    with pytest.raises(ValueError, match=message):
        raise ValueError(pack(**options))
    assert not Path("out").exists()


def test_broken_tables_are_named(pack: Pack, photos: Path) -> None:
    for name, content, message in [
        ("m.jsonl", b'{"file_name": "a.png", "text": "x"}\n{', "m.jsonl cannot be read: line 2 is not JSON"),
        ("m.csv", b"file_name,text\na.png,caf\xe9\n", "m.csv is not UTF-8 text"),
        ("m.csv", b"file_name,text\na.png,b,c\n", "m.csv cannot be read: line 2 has 3 values for 2 columns"),
        ("m.csv", b"", "m.csv has no rows"),
    ]:
        (photos / name).write_bytes(content)
        assert message in pack(captions=name)


def test_folders_without_pictures_or_captions(pack: Pack, tmp_path: Path) -> None:
    assert "folder=photos: no such folder" in pack()
    (tmp_path / "photos").mkdir()
    assert "folder=photos holds no pictures" in pack()
    (tmp_path / "photos/00000.tar").touch()
    assert "data.train=photos trains on them as they are" in pack()
    picture(tmp_path / "photos/a.png")
    (tmp_path / "photos/labels.csv").write_text("bild,titel\na.png,x")
    said = pack()
    assert "photos has no captions. Captions are read from .txt files" in said and "1 (labels.csv)" in said
    assert "captions: none" in pack(missing_caption="empty")
    assert "out=photos/a.png is a file" in pack("photos/a.png")


def test_references_make_paired_data(pack: Pack, photos: Path, tmp_path: Path) -> None:
    for i in range(22):
        folder = "cats" if i < 12 else "dogs"
        picture(tmp_path / f"before/{folder}/{i:02d}.{'jpg' if i % 2 else 'webp'}", colour=(0, i, 0))

    said = pack(references="before", samples_per_shard=10)

    read = {record.key: record for record in records("out", reference=["ref.jpg", "ref.webp"])}
    assert len(read) == 22 and "left out, no reference: 1 (dogs/22.png)" in said
    assert read["cats_03"].references == ((tmp_path / "before/cats/03.jpg").read_bytes(),)
    assert read["cats_03"].picture == (photos / "cats/03.png").read_bytes()
    command = said.splitlines()[-1].removeprefix("next: ")
    assert command.endswith("data.train=out 'data.reference=[ref.jpg,ref.webp]'")


def test_references_inside_the_folder_are_not_packed_themselves(pack: Pack, photos: Path) -> None:
    picture(photos / "refs/cats/00.png", colour="red")

    pack(references="photos/refs")
    assert [record.key for record in records("out", reference="ref.png")] == ["cats_00"]


def test_references_of_other_names(pack: Pack, photos: Path, tmp_path: Path) -> None:
    picture(tmp_path / "before/x.png")
    assert "no picture of the name of one of 23 (cats/00.png" in pack(references="before")
    picture(tmp_path / "before/x.jpg")
    assert "references=before has both x.jpg and x.png" in pack(references="before")


def test_larger_pictures_are_shrunk(pack: Pack, tmp_path: Path) -> None:
    captioned(tmp_path / "photos/small.png", size=(40, 20))
    captioned(tmp_path / "photos/wide.png", size=(201, 67), colour="red")
    captioned(tmp_path / "photos/clear.png", size=(50, 90), colour=(200, 0, 0, 90), mode="RGBA")
    captioned(tmp_path / "photos/grey.jpg", size=(500, 400), colour=77, mode="L")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (300, 100), "blue").save(captioned(tmp_path / "photos/turned.jpg"), exif=turned)

    pack(size=20)

    named = metadata("out")
    assert {name: (entry["width"], entry["height"]) for name, entry in named.items()} == {
        "small.png": (40, 20),
        "wide.png": (60, 20),
        "clear.png": (20, 36),
        "grey.jpg": (25, 20),
        "turned.jpg": (20, 60),
    }
    assert (named["turned.jpg"]["original_width"], named["turned.jpg"]["original_height"]) == (100, 300)
    read = {record.key: record for record in records("out")}
    assert read["small"].picture == (tmp_path / "photos/small.png").read_bytes()
    for key, kind in (("wide", "JPEG"), ("grey", "JPEG"), ("turned", "JPEG"), ("clear", "WEBP")):
        with Image.open(io.BytesIO(read[key].picture)) as opened:
            assert opened.format == kind and opened.size == read[key].size
            assert opened.size == (
                named[f"{key}.{'jpg' if key in ('grey', 'turned') else 'png'}"]["width"],
                opened.height,
            )
    with Image.open(io.BytesIO(read["clear"].picture)) as opened:
        red, *others = opened.convert("RGBA").getpixel((10, 10))
        assert abs(red - 200) <= 1 and others == [0, 0, 90]  # colours are resized weighted by their alpha
    assert open_picture(read["turned"].picture, "white", 10**6).size == (20, 60)


def test_what_cannot_be_shrunk_is_counted_apart(pack: Pack, photos: Path) -> None:
    path = photos / "cats/00.png"
    picture(path, size=(400, 300))
    path.write_bytes(path.read_bytes()[:100])

    assert "left out, broken picture, cannot be shrunk: 1 (cats/00.png)" in pack(size=50)
    stats = json.loads(Path("out/00000_stats.json").read_text())
    assert (stats["successes"], stats["failed_to_download"], stats["failed_to_resize"]) == (22, 0, 1)


@pytest.mark.parametrize("out", ["out", "my shards", "a=b,c", "[x]", "ünï/a.b-c"])
def test_the_next_command_can_be_run(pack: Pack, photos: Path, out: str) -> None:
    import shlex

    said = pack(out if "=" not in out else f"./{out}")
    words = shlex.split(said.splitlines()[-1].removeprefix("next: python train.py "))

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*words, "name=x"])
    assert len(records(cfg.data.train)) == 23


def test_an_unwritable_place_is_told(pack: Pack, photos: Path) -> None:
    Path("file").touch()
    said = pack("file/out")
    assert "could not write file/out/00000.tar" in said and "choose another folder with out=FOLDER" in said


def test_a_caption_is_read_as_a_fields_text(pack: Pack, photos: Path) -> None:
    (photos / "cats/00.txt").write_bytes("\ufeffnaïve\r\n".encode())
    pack(shuffle=False)
    with tarfile.open("out/00000.tar") as tar:
        assert read_texts(Fields({"txt": tar.extractfile("cats_00.txt").read()}), "txt") == ["naïve"]
