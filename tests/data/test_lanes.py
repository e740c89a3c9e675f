"""Lanes: readers that open no other's shards, a place that leaves what lies behind unopened, several sources."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest
from tars import good, write_tar
from test_stream import keys, rows, train, train_rows

from ipa.data.images.preparation import ImagePreparation
from ipa.data.order.lanes import Lanes, Share
from ipa.data.order.sequence import Order
from ipa.data.order.streams import TrainStream
from ipa.data.records import Record
from ipa.data.rejects import NoGoodSamples, Rejected
from ipa.data.shards.source import ShardSource
from ipa.types import Position

SHARDS, SAMPLES = 8, 10


@pytest.fixture
def many_shards(tmp_path: Path) -> list[str]:
    return [
        write_tar(tmp_path / f"{s:05d}.tar", [m for i in range(SAMPLES) for m in good(f"{s:05d}{i:04d}")])
        for s in range(SHARDS)
    ]


@dataclass
class Watched:
    """A source that remembers which shards were opened."""

    source: ShardSource
    opened: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def read(self, shard: str) -> Iterator[Record | Rejected]:
        self.opened.append(Path(shard).name)
        yield from self.source.read(shard)


def watched(shards: list[str], window: int = 6) -> tuple[Order, list[str]]:
    source = Watched(ShardSource.of("train", shards=shards))
    return Order([source], 0, window), source.opened  # type: ignore[list-item]


def opened_by(shards: list[str], preparation: ImagePreparation, share: Share, lanes: Lanes, steps: int) -> set[str]:
    order, opened = watched(shards)
    stream = TrainStream(order, preparation, 2, share, lanes)
    list(islice(stream.batches(share), steps))
    return set(opened)


def test_readers_open_shards_of_their_own(many_shards, preparation) -> None:
    """A pass of 2 ranks × 2 workers, 20 samples each: 10 batches of 2, and no shard twice."""
    shares = [Share(rank, 2, worker, 2) for rank in range(2) for worker in range(2)]
    opened = [opened_by(many_shards, preparation, share, Lanes(2, 2), steps=10) for share in shares]
    assert sum(map(len, opened)) == SHARDS == len(set.union(*opened))


def test_a_pass_over_all_lanes_brings_every_sample_once(many_shards, make_order, preparation) -> None:
    steps = train(make_order(many_shards), preparation, 2, 20, 2, 2, Lanes(2, 2))
    seen = Counter(keys([batch for step in steps for batch in step]))
    assert len(seen) == SHARDS * SAMPLES and set(seen.values()) == {1}


@pytest.mark.parametrize("lanes", [Lanes(), Lanes(2, 2), Lanes(4, 1), Lanes(1, 3)], ids=str)
def test_the_order_depends_on_the_lanes_not_on_their_readers(many_shards, make_order, preparation, lanes) -> None:
    order = make_order(many_shards)
    expected = train_rows(order, preparation, 4, 22, lanes=lanes)  # a pass has 20
    for batch, world, workers in [(4, 1, 3), (2, 2, 1), (2, 2, 5), (1, 4, 2)]:
        assert train_rows(order, preparation, batch, 22, world, workers, lanes) == expected


@pytest.mark.parametrize("stop", [1, 7, 20, 23])
def test_other_readers_resume_where_the_first_stopped(many_shards, make_order, preparation, stop) -> None:
    """Two ranks with two workers, then one with three, then four with none but one."""
    lanes, order = Lanes(2, 2), make_order(many_shards)
    whole = train(order, preparation, 2, 40, 2, 2, lanes)
    position = Position()
    for step in whole[:stop]:
        for batch in step:
            position.step = batch.position.step
            position.lanes.update(batch.position.lanes)
    for batch_size, world, workers in [(4, 1, 3), (1, 4, 1), (2, 2, 2)]:
        rest = train(order, preparation, batch_size, 12, world, workers, lanes, position)
        assert [sorted(row for b in step for row in rows(b)) for step in rest] == [
            sorted(row for b in step for row in rows(b)) for step in whole[stop : stop + 12]
        ]


def test_shards_behind_the_open_window_stay_closed(many_shards, preparation) -> None:
    order, opened = watched(many_shards)
    stream = TrainStream(order, preparation, 4)
    whole = list(islice(stream, 20))
    pass_order = list(dict.fromkeys(opened))[:SHARDS]
    opened.clear()
    stream.begin_at(whole[14].position)  # 60 of 80 samples lie behind; the window of the last begins with the 54th

    rest = list(islice(stream, 5))

    assert [rows(batch) for batch in rest] == [rows(batch) for batch in whole[15:]]
    assert opened == pass_order[5:]


@pytest.mark.parametrize("world", [1, 2])
def test_a_bad_shard_of_a_lane_stops_nobody(many_shards, make_order, preparation, world, tmp_path) -> None:
    """Five of eight shards hold nothing: a lane without a sample in a pass goes on to the next."""
    for shard in many_shards[:5]:
        Path(shard).write_bytes(b"<html>")
    steps = train(make_order(many_shards), preparation, 2, 30, world, 2, Lanes(world, 2))
    batches = [batch for step in steps for batch in step]
    assert all(len(batch) == 2 for batch in batches)
    assert {key[:5] for key in keys(batches)} == {"00005", "00006", "00007"}
    assert set(sum((Counter(batch.rejects) for batch in batches), Counter())) == {"broken tar"}


def test_sources_are_mixed_by_their_weights(many_shards, preparation) -> None:
    sources = [
        ShardSource.of("much", shards=many_shards[:6], weight=3.0),
        ShardSource.of("little", shards=many_shards[6:], weight=1.0),
    ]
    order = Order(sources, seed=0, window=7)
    steps = train(order, preparation, 5, 80, lanes=Lanes(1, 2))
    shards = Counter(shard for [batch] in steps for shard in batch.shards)
    little = sum(shards[Path(shard).name] for shard in many_shards[6:])
    assert 70 < little < 130  # a quarter of 400, three standard deviations
    assert max(shards.values()) - min(shards.values()) < 40  # within a source its shards come equally often
    position = steps[30][0].position
    merged = Position(position.step, {**steps[29][0].position.lanes, **position.lanes})
    rest = train(order, preparation, 5, 10, workers=2, lanes=Lanes(1, 2), start=merged)
    assert [rows(b) for [b] in rest] == [rows(b) for [b] in steps[31:41]]


def test_a_broken_picture_of_a_large_source_is_replaced_though_the_small_one_is_many_passes_ahead(
    many_shards, tmp_path, preparation
) -> None:
    """Passes of several sources are no measure of each other."""
    broken = [("x.txt", b"a thing"), ("x.png", b"?")]
    little = write_tar(tmp_path / "little.tar", good("only"))
    much = ShardSource.of("much", shards=write_tar(tmp_path / "much.tar", [*good("first"), *broken, *good("second")]))
    order = Order([much, ShardSource.of("little", shards=little, weight=20.0)], seed=0, window=9)
    steps = train(order, preparation, 4, 60)
    assert {key for [batch] in steps for key in batch.keys} == {"only", "first", "second"}


def test_nothing_good_in_any_source_is_an_error(tmp_path, preparation) -> None:
    broken = [("x.txt", b"a thing"), ("x.png", b"?")]
    sources = [ShardSource.of(name, shards=write_tar(tmp_path / f"{name}.tar", broken)) for name in ("one", "other")]
    with pytest.raises(NoGoodSamples, match=r"data\.one, other: .* \(2 × broken picture: x of one\.tar, x of"):
        train(Order(sources, seed=0), preparation, 2, 1)


@pytest.mark.parametrize(
    ("share", "shards", "lanes", "message"),
    [
        (Share(0, 2, 0, 4), 100, Lanes(2, 4), ""),
        (Share(0, 2, 0, 4), 8, Lanes(2, 4), ""),
        (Share(0, 2, 0, 4), 7, Lanes(2, 1), "7 shards for 8 workers: 4 workers read each shard in full"),
        (Share(0, 8, 0, 4), 4, Lanes(1, 4), "4 shards for 32 workers: 8 workers read each shard in full"),
        (Share(0, 8, 0, 4), 3, Lanes(1, 1), "3 shards for 32 workers: 32 workers read each shard in full"),
        (Share(0, 1, 0, 4), 1, Lanes(1, 1), "1 shards for 4 workers: 4 workers read each shard in full"),
    ],
)
def test_lanes_fit_readers_and_shards(share: Share, shards: int, lanes: Lanes, message: str, caplog) -> None:
    assert Lanes.fitting(share, shards) == lanes
    assert [record.getMessage() for record in caplog.records] == [message] * bool(message)


@pytest.mark.parametrize("lanes", [Lanes(), Lanes(2, 2), Lanes(4, 3)], ids=str)
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 2), (4, 3), (2, 5)])
@pytest.mark.parametrize("step", [0, 5])
def test_every_lane_is_read(lanes: Lanes, world: int, workers: int, step: int) -> None:
    shares = [Share(rank, world, worker, workers) for rank in range(world) for worker in range(workers)]
    assert set.union(*(lanes.read_by(share, step, 4 * world) for share in shares)) == set(range(lanes.number))
