"""Pairs: which sample lends another its reference, and that nothing but data and seed decides it."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dirt import write_dirty_shard
from tars import Members, png, write_tar
from torch import Tensor

from ipa.data.addresses import Address
from ipa.data.datamodule import ShardDataModule
from ipa.data.images.transforms import Background
from ipa.data.order.lanes import Share
from ipa.data.pairs import building, partners
from ipa.data.pairs.building import build_index, list_jobs
from ipa.data.pairs.index import Index, WrongIndex, open_index
from ipa.data.pairs.options import Pairs
from ipa.data.pairs.partners import Partners
from ipa.data.records import Record
from ipa.data.shards.source import ShardSource
from ipa.errors import UserError
from ipa.types import Batch

STYLES, THINGS = ("ink", "oil", "pen"), 7
STYLE_PAIRS = {"by": "style", "self": 0.25}
THING_PAIRS = {"by": ["json.thing"], "differ": "style", "self": 0}


def colour(style: int, thing: int, alpha: int = 255) -> tuple[int, int, int, int]:
    """Tells a reference's sample."""
    return 40 * style, 20 * thing, 100, alpha


def sample(number: int) -> Members:
    style, thing = number % 3, number // 3
    entry = {"style": STYLES[style], "thing": thing, "n": number, "kind": "only" if number else "other"}
    members = [("json", json.dumps(entry).encode()), ("txt", b"it"), ("png", png((8, 8), colour(style, thing), "RGBA"))]
    return [(f"{number:04d}.{extension}", content) for extension, content in members]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """21 samples in three shards: seven things in three styles."""
    numbers = np.random.default_rng(0).permutation(3 * THINGS).tolist()
    parts = [numbers[:6], numbers[6:11], numbers[11:]]
    return [write_tar(tmp_path / f"data/{i}.tar", [m for n in part for m in sample(n)]) for i, part in enumerate(parts)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(train: object, pairs: Any, **options: Any) -> ShardDataModule:
    usual = {"batch_size": 6, "num_workers": 0, "window": 5, "lanes": {"ranks": 1, "workers": 1}, "pairs": pairs}
    data = ShardDataModule(train, **{**usual, **options})
    data.fit_to(image_size_px=8, reference_size_px=6, latent_shape=(2, 3, 3))
    return data


def told_by(pixels_3HW: Tensor) -> tuple[int, int]:
    """Style and thing of a picture."""
    red, green, _ = pixels_3HW[:, 3, 3].tolist()
    return round(red / 40), round(green / 20)


def seen(batch: Batch) -> list[tuple[Any, ...]]:
    """Key, what target and reference show, and a draw of every sample."""
    assert batch.image_B3HW is not None and batch.reference_B3HW is not None
    shown = [tuple(map(told_by, images)) for images in zip(batch.image_B3HW, batch.reference_B3HW, strict=True)]
    return [(*each, time) for *each, time in zip(batch.keys, shown, batch.draws.time_B.tolist(), strict=True)]


def take(data: ShardDataModule, number: int) -> list[tuple[Any, ...]]:
    """Samples of the next batches, of which more are fetched."""
    batches = list(islice(data.train_dataloader(), number + 2))[:number]
    for batch in batches:
        data.consumed(batch)
    return [row for batch in batches for row in seen(batch)]


def test_references_come_from_the_same_group_and_some_from_the_sample_itself(shards: list[str]) -> None:
    rows = take(make(shards, STYLE_PAIRS), 40)
    assert all(target[0] == shown[0] for _, (target, shown), _ in rows)
    assert 0.15 < sum(target == shown for _, (target, shown), _ in rows) / len(rows) < 0.35
    assert len({pair for _, pair, _ in rows}) > 100  # of 147
    rows = take(make(shards, THING_PAIRS), 40)
    assert all(target[1] == shown[1] and target[0] != shown[0] for _, (target, shown), _ in rows)
    assert len({pair for _, pair, _ in rows}) == 3 * THINGS * 2  # each of them


def test_workers_ranks_and_batch_size_change_nothing(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = take(make(shards, STYLE_PAIRS), 10)
    assert take(make(shards, STYLE_PAIRS, num_workers=2), 10) == whole
    assert take(make(shards, STYLE_PAIRS, batch_size=3), 20) == whole
    ranks = [make(shards, STYLE_PAIRS, batch_size=3) for _ in range(2)]
    for rank, data in enumerate(ranks):
        monkeypatch.setattr(data, "share", lambda rank=rank: Share(rank, 2))
    parts = [take(data, 10) for data in ranks]
    assert [row for both in zip(*parts, strict=True) for row in both] == whole


def test_the_reference_has_a_background_of_its_own(tmp_path: Path) -> None:
    """Transparent pictures: the target is on red or blue, the reference on white or black."""
    members = [[("txt", b"it"), ("png", png((8, 8), (0, 0, 0, 0), "RGBA"))] for _ in range(20)]
    shard = write_tar(tmp_path / "0.tar", [(f"{n}.{e}", data) for n, each in enumerate(members) for e, data in each])
    options = {"background": Background(["red", "blue"], 0), "batch_size": 20}

    def corners(reference_background: Background | None) -> set[tuple[tuple[int, ...], ...]]:
        batch = next(iter(make(shard, None, **options, reference_background=reference_background).train_dataloader()))
        pixels = (batch.image_B3HW[..., 0, 0].tolist(), batch.reference_B3HW[..., 0, 0].tolist())
        return set(zip(*(map(tuple, rows) for rows in pixels), strict=True))

    red, blue, white, black = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
    assert corners(None) == {(red, red), (blue, blue)}
    assert corners(Background(["black"], 0.5)) == {(a, b) for a in (red, blue) for b in (white, black)}


def test_validation_shows_each_sample_its_own_image(shards: list[str]) -> None:
    data = make(shards, THING_PAIRS, val=shards, reference_background=Background(["red"], 0))
    rows = [row for batch in data.val_dataloader() for row in seen(batch)]
    assert len(rows) == 21 and all(target == shown for _, (target, shown), _ in rows)


def index_of(shards: Sequence[str], out: Path, workers: int = 1, **pairs: Any) -> Index:
    source = ShardSource.of("train", shards=list(shards))
    build_index(list_jobs([source]), Pairs.of(pairs), out, workers)
    open_index.cache_clear()
    return open_index(str(out))


def entries(shards: Sequence[str]) -> list[dict[str, Any]]:
    """The metadata of all samples, in the order of the rows."""
    found = []
    for shard in shards:
        keys = [
            record.key for record in ShardSource.of("train", shards=shard).read(shard) if isinstance(record, Record)
        ]
        found += [json.loads(sample(int(key))[0][1]) for key in keys]
    return found


def expected(entry: dict[str, Any], all_entries: list[dict[str, Any]], by: list[str], differ: str) -> set[int]:
    """Rows that may be its partners, by definition."""
    for name in by:
        fitting = [e[name] == entry[name] and e[differ] != entry[differ] for e in all_entries]
        if any(fitting):
            return {row for row, fits in enumerate(fitting) if fits}
    return {all_entries.index(entry)}


@pytest.mark.parametrize(
    ("by", "differ"),
    [(["style"], None), (["thing"], "style"), (["n", "style"], None), (["kind"], None), (["kind", "style"], "thing")],
)
def test_partners_are_those_of_the_finest_group_that_has_any(shards, by, differ, tmp_path: Path) -> None:
    index, rows = index_of(shards, tmp_path / "x", by=by, differ=differ), entries(shards)
    for row, entry in enumerate(rows):
        found = {index.partner(row, number) for number in range(100)}
        assert found == expected(entry, rows, by, differ or "n")
        place = index.place(row)
        assert index.row("train", place.shard, place.number, f"{entry['n']:04d}") == row


def test_what_becomes_of_every_sample_is_counted(shards: list[str], tmp_path: Path) -> None:
    report = index_of(shards, tmp_path / "x", by=["n", "kind"]).about["report"]
    unique, kind = report["levels"]
    assert (unique["groups"], unique["of_one"], unique["paired"]) == (21, 21, 0)
    assert (kind["groups"], kind["of_one"], kind["smallest"], kind["largest"], kind["paired"]) == (2, 1, 1, 20, 20)
    assert report["alone"] == 1


def test_every_sample_of_a_dirty_shard_is_found_at_its_place(tmp_path: Path) -> None:
    """Also behind long names, which have headers of their own, and behind the end of an archive that `cat` extended."""
    write_dirty_shard(tmp_path / "0.tar", 0, samples=60, share=0.4)
    long = [(f"{'long' * 40}{n}.{e}", data) for n in range(5) for e, data in (("txt", b"it"), ("png", png()))]
    write_tar(tmp_path / "long.tar", long)
    more = [(f"more{n}.{e}", data) for n in range(5) for e, data in (("txt", b"it"), ("png", png()))]
    write_tar(tmp_path / "more.tar", more)
    (tmp_path / "1.tar").write_bytes((tmp_path / "long.tar").read_bytes() + (tmp_path / "more.tar").read_bytes())
    for shard, least in ((f"{tmp_path}/0.tar", 20), (f"{tmp_path}/1.tar", 10)):
        source = ShardSource.of("train", shards=shard)
        records = [record for record in source.read(shard) if isinstance(record, Record)]
        for record in records:
            begin, end = record.span
            data = Path(shard).read_bytes()[begin:end]
            found = source.read_at(shard, record.index, data)
            assert found == replace(record, rejects=[], span=(0, 0), measured=found.measured)
        assert len(records) >= least


def test_processes_and_a_kill_change_no_byte(shards: list[str], tmp_path: Path) -> None:
    """A part that is there is not made again, and the parts go when the index is complete."""
    index_of(shards, tmp_path / "one", by="style")
    index_of(shards, tmp_path / "two", workers=2, by="style")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    jobs, pairs = list_jobs([ShardSource.of("train", shards=shards)]), Pairs.of({"by": "style"})

    def die(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(jobs, pairs, tmp_path / "three", 1, die)
    (part,) = (tmp_path / ".three.parts").iterdir()
    made = part.stat().st_mtime_ns
    monkey: list[int] = []
    build_index(jobs, pairs, tmp_path / "three", 1, lambda n: monkey.append(part.stat().st_mtime_ns))
    assert monkey[0] == made and not (tmp_path / ".three.parts").exists()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes()


def test_another_process_may_make_the_index_meanwhile(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assemble = building.assemble

    def after_another(*parts: Any) -> Any:
        monkeypatch.setattr(building, "assemble", assemble)
        make(shards, STYLE_PAIRS)
        return assemble(*parts)

    monkeypatch.setattr(building, "assemble", after_another)
    assert take(make(shards, STYLE_PAIRS), 1) == take(make(shards, STYLE_PAIRS), 1)


def test_data_may_move_with_their_index_and_other_pairs_are_another_order(shards: list[str], tmp_path: Path) -> None:
    index_of(shards, tmp_path / "x.safetensors", by="style")
    whole = make(shards, {**STYLE_PAIRS, "index": f"{tmp_path}/x.safetensors"})
    moved = (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "x.safetensors").rename(moved / "x")
    other = make(str(moved), {**STYLE_PAIRS, "index": str(moved / "x")})
    assert other.fingerprint() == whole.fingerprint() == make(str(moved), STYLE_PAIRS).fingerprint()
    assert take(other, 3) == take(make(str(moved), STYLE_PAIRS), 3)
    for pairs in (None, THING_PAIRS, {**STYLE_PAIRS, "self": 0.5}):
        assert make(str(moved), pairs).fingerprint() != whole.fingerprint()


def test_a_broken_partner_is_counted_and_no_fault_of_the_sample(tmp_path: Path) -> None:
    """Every third sample has half a picture: it is rejected as a target, and slots that chose it are filled anew."""
    members = []
    for n in range(12):
        entry, picture = json.dumps({"style": "one"}).encode(), png((8, 8), colour(0, n))
        picture = picture[:50] if n % 3 == 2 else picture
        members += [(f"{n:04d}.json", entry), (f"{n:04d}.txt", b"it"), (f"{n:04d}.png", picture)]
    shard = write_tar(tmp_path / "0.tar", members)
    whole, rejects = make(shard, {"by": "style", "self": 0}), Counter[str]()
    rows = take(whole, 20)
    rejects.update(whole.rejected.counts)
    assert rejects["broken partner"] > 5 and rejects["broken picture"] > 5
    assert {told_by_key for told_by_key, *_ in rows} == {f"{n:04d}" for n in range(12) if n % 3 < 2}
    example = whole.rejected.examples["broken partner"][0]
    assert example[0].endswith("of 0.tar") and example[1].startswith("broken picture")
    stopped = make(shard, {"by": "style", "self": 0}, num_workers=1)
    take(stopped, 7)
    resumed = make(shard, {"by": "style", "self": 0})
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 13) == rows[42:]


Change = Callable[[Path, list[str]], None]


def append(path: Path, shards: list[str]) -> None:
    with open(shards[1], "ab") as file:
        file.write(bytes(512))


def rewrite(path: Path, shards: list[str]) -> None:
    """The same size, other keys."""
    data = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(data.replace(b"00", b"01"))


def cut(path: Path, shards: list[str]) -> None:
    os.truncate(path, path.stat().st_size - 8)


@pytest.mark.parametrize(
    ("change", "pairs", "complaint"),
    [
        (append, {}, r"other shards of train: of another size: 1\.tar"),
        (lambda path, shards: shards.pop(), {}, r"other shards of train: missing: 2\.tar"),
        (lambda path, shards: os.rename(shards[0], shards.pop(0) + ".tar"), {}, "missing: 0.tar"),
        (cut, {}, "is no pairing index, or a damaged one"),
        (lambda path, shards: os.truncate(path, 0), {}, "is no pairing index"),
        (lambda path, shards: path.write_bytes(os.urandom(999)), {}, "is no pairing index"),
        (lambda path, shards: path.unlink(), {}, "there is no pairing index"),
        (lambda path, shards: None, {"by": "thing"}, "was made with by=style, not by=thing"),
        (lambda path, shards: None, {"differ": "thing"}, "was made with by=style, not by=style differ=thing"),
    ],
)
def test_another_index_is_refused(shards, tmp_path: Path, change: Change, pairs: Any, complaint: str) -> None:
    path = tmp_path / "x.safetensors"
    index_of(shards, path, by="style")
    change(path, shards)
    open_index.cache_clear()
    with pytest.raises(WrongIndex, match=complaint):
        make(shards, {**STYLE_PAIRS, "index": str(path), **pairs})


def test_filters_other_than_the_indexs_are_refused(shards: list[str], tmp_path: Path) -> None:
    index_of(shards, tmp_path / "x", by="style")
    with pytest.raises(WrongIndex, match=r"data\.captions, filters"):
        make(shards, {**STYLE_PAIRS, "index": f"{tmp_path}/x"}, filters={"a": {"key": "json.n", "min": 1}})


def test_a_shard_that_was_rewritten_in_its_size_is_noticed_at_the_first_sample(shards, tmp_path: Path) -> None:
    index_of(shards, tmp_path / "x", by="style")
    partners.opened.cache_clear()
    rewrite(tmp_path, shards)
    data = make(shards, {**STYLE_PAIRS, "index": f"{tmp_path}/x"})
    with pytest.raises(WrongIndex, match=r"(does not know sample \d+ of 1\.tar|1\.tar has changed)"):
        take(data, 9)


@pytest.mark.parametrize(
    ("pairs", "complaint"),
    [
        ({"by": "artist"}, r"by=artist: none of 21 samples has json\.artist\. .* have style, thing, n, kind"),
        ({"by": ["style", "artist"]}, "by=artist: none of 21 samples"),
        ({"by": "style", "differ": "artist"}, "differ=artist: none of 21 samples"),
        ({"by": "n"}, "by=n: none of 21 samples has a partner, since every group has only one sample"),
        ({"by": "style", "differ": "style"}, "differ=style: give one entry"),
        ({"differ": "style"}, "data.pairs.differ needs data.pairs.by"),
        ({"index": "x"}, "data.pairs.index needs data.pairs.by"),
        ({"by": 3}, "data.pairs.by=3"),
        ({"by": ["a", "a"]}, "each once"),
        ({"by": "style", "self": 2}, "data.pairs.self=2"),
        ({"by": "style", "share": 1}, "data.pairs has no share; there are by, differ, self, strip, index"),
        ("style", "data.pairs=style: give a mapping"),
    ],
)
def test_mistakes_are_named(shards: list[str], pairs: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        make(shards, pairs)


def test_shards_that_cannot_be_read_at_a_place_are_refused(shards: list[str], tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"0\.tar is remote\. Copy the shards"):
        make("https://host/0.tar", STYLE_PAIRS)
    (tmp_path / "z.tar.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(UserError, match=r"z\.tar\.gz is compressed: unpack it"):
        make(f"{tmp_path}/z.tar.gz", STYLE_PAIRS)
    other = write_tar(tmp_path / "other/0.tar", sample(0))
    with pytest.raises(UserError, match=r"2 shards are called 0\.tar"):
        make([shards[0], other], STYLE_PAIRS)
    monkeypatch.setattr(partners, "AUTOMATIC_BYTES", 1000)
    with pytest.raises(UserError, match=r"ipa\.tools\.pair … by=style out=FILE` makes it once"):
        make(shards, STYLE_PAIRS)


def test_lists_blank_texts_and_nan_are_no_groups(tmp_path: Path) -> None:
    values = [["a"], {"a": 1}, " ", None, float("nan"), "a", "a ", 1, 1.0, "1"]
    members = []
    for n, value in enumerate(values):
        content = {"json": json.dumps({"g": value}).encode(), "txt": b"it", "png": png()}
        members += [(f"{n}.{extension}", data) for extension, data in content.items()]
    index = index_of([write_tar(tmp_path / "0.tar", members)], tmp_path / "x", by="g")
    groups = index.arrays["groups.0"].tolist()
    assert groups[:5] == [-1] * 5 and groups[5] == groups[6] and groups[7] == groups[8] == groups[9]
    assert index.about["report"]["levels"][0]["without"] == 5


def test_the_draw_depends_on_the_address_alone(shards: list[str], tmp_path: Path) -> None:
    source = ShardSource.of("train", shards=shards)
    index = index_of(shards, tmp_path / "x", by="style")
    lenders = Partners(index.path, 0.2, [source])
    record = next(record for record in source.read(shards[0]) if isinstance(record, Record))
    record.source = "train"
    keys = [lenders.lend(record, Address(1, epoch, "train", "0.tar", 0)).key for epoch in range(2000)]
    counts = Counter(keys)
    assert counts.pop(record.key) == pytest.approx(400, abs=80)
    assert len(counts) == THINGS - 1 and max(counts.values()) < 1.35 * min(counts.values())
    assert any(one != other for one, other in pairwise(keys))
