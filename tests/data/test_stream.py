"""Order, shares, stand-ins: what is seen is a pure function of seed and shards."""

import logging
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from dirt import Content
from tars import good, png, write_tar

from ipa.data.images.preparation import ImagePreparation
from ipa.data.order.lanes import Lane, Lanes, Share
from ipa.data.order.sequence import LaneOrder, Order, Slot
from ipa.data.order.streams import TrainStream, ValStream
from ipa.data.rejects import NoGoodSamples
from ipa.types import Batch, LanePlace, Position, SourcePlace

MakeOrder = Callable[..., Order]
Row = tuple[str, float, float, bool]


def rows(batch: Batch) -> list[Row]:
    """What identifies a sample and its draws."""
    draws = batch.draws
    numbers = zip(draws.noise_BCHW[:, 0, 0, 0].tolist(), draws.time_B.tolist(), draws.drop_text_B.tolist(), strict=True)
    return [(key, *drawn) for key, drawn in zip(batch.keys, numbers, strict=True)]


def train(
    order: Order,
    preparation: ImagePreparation,
    batch: int,
    steps: int,
    world: int = 1,
    workers: int = 1,
    lanes: Lanes | None = None,
    start: Position | None = None,
) -> list:
    """The batches of each step over all ranks, every one made by the worker whose turn it is."""
    streams = [TrainStream(order, preparation, batch, Share(rank, world), lanes or Lanes()) for rank in range(world)]
    for stream in streams:
        stream.begin_at(start or Position())
    shares = [[Share(rank, world, worker, workers) for worker in range(workers)] for rank in range(world)]
    made = [[stream.batches(share) for share in mine] for stream, mine in zip(streams, shares, strict=True)]
    return [[next(made[rank][step % workers]) for rank in range(world)] for step in range(steps)]


def train_rows(*args: object, **options: object) -> list:
    """The rows of each step over all ranks."""
    made = train(*args, **options)
    return [sorted(row for batch in step for row in rows(batch)) for step in made]


def endless(order: Order, number: int) -> list[Slot]:
    """The first samples of the only lane."""
    return list(islice(LaneOrder(order, Lane(), 1).endless(order.begin()), number))


def validate(order: Order, preparation: ImagePreparation, batch: int, world: int = 1, workers: int = 1):
    stream = ValStream(order, preparation, batch)
    shares = [Share(rank, world, worker, workers) for rank in range(world) for worker in range(workers)]
    return [list(stream.batches(share)) for share in shares]


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def counted(batches: list[Batch]) -> Counter[str]:
    return sum((Counter(batch.rejects) for batch in batches), Counter())


def test_each_pass_brings_every_sample_once_in_another_order(clean_shards: list[str], make_order: MakeOrder) -> None:
    slots = endless(make_order(clean_shards), 40)
    first, second = [slot.record.key for slot in slots[:20]], [slot.record.key for slot in slots[20:]]
    assert len(set(first)) == 20 and set(first) == set(second) and first != second
    assert [slot.epoch for slot in slots] == [0] * 20 + [1] * 20
    assert [slot.record.key for slot in endless(make_order(clean_shards, seed=1), 20)] != first


@pytest.mark.parametrize(("batch", "world", "workers"), [(2, 2, 2), (1, 4, 6)])  # more than samples, too
def test_readers_change_nothing_in_dirty_data(
    dirty: tuple[str, Content], make_order, preparation, batch: int, world: int, workers: int
) -> None:
    order = make_order([dirty[0]], window=3)
    assert train_rows(order, preparation, batch, 9, world, workers) == train_rows(order, preparation, 4, 9)


def test_batches_hold_what_they_promise(clean_shards, make_order, preparation) -> None:
    batch = next(iter(TrainStream(make_order(clean_shards), preparation, 5)))
    assert batch.image_B3HW.shape == (5, 3, 8, 8) and batch.image_B3HW.dtype == torch.uint8
    assert batch.reference_B3HW.shape == (5, 3, 6, 6)
    assert batch.draws.noise_BCHW.shape == (5, 2, 3, 3)
    assert batch.text == ["a thing"] * 5 and len(batch) == 5
    assert all(key.startswith(shard.removesuffix(".tar")) for key, shard in zip(batch.keys, batch.shards, strict=True))
    assert batch.position == Position(1, {0: LanePlace(5, (SourcePlace(0, 0, 0, 5),))}) and batch.rejects == {}


@pytest.mark.parametrize("window", [3, 80])  # many in a pass of 26 samples, or one
def test_resuming_from_any_position_continues_the_sequence_and_its_counts(
    dirty: tuple[str, Content], clean_shards: list[str], make_order, preparation, window: int
) -> None:
    """Also at the end of a pass."""
    order = make_order([dirty[0], *clean_shards], window=window)
    stream = TrainStream(order, preparation, 3)
    whole = list(islice(stream, 11))
    for step, batch in enumerate(whole[:-1]):
        stream.begin_at(batch.position)
        rest = list(islice(stream, 10 - step))
        assert [rows(b) for b in rest] == [rows(b) for b in whole[step + 1 :]]
        assert counted(rest) == counted(whole[step + 1 :])


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (6, 1)])
def test_training_counts_every_reject_once_a_pass(
    dirty: tuple[str, Content], make_order, preparation, world: int, workers: int
) -> None:
    order, content = make_order([dirty[0]], window=3), dirty[1]
    shares = [Share(rank, world, worker, workers) for rank in range(world) for worker in range(workers)]
    per_rank, passes = 6 // world, 3  # 6 records a pass are good as far as can be seen without decoding
    batches = []
    for share in shares:
        stream = TrainStream(order, preparation, per_rank, Share(share.rank, world))
        batches += islice(stream.batches(share), passes // workers)
    assert counted(batches) == {reason: passes * n for reason, n in content.rejects.items()}
    assert set(keys(batches)) == set(content.good)


def test_a_replacement_keeps_the_draws_of_its_slot(make_order, preparation, tmp_path: Path) -> None:
    members = [*good("a"), ("b.txt", b"broken"), ("b.png", b"?"), *good("c")]
    repaired = [*good("a"), *good("b"), *good("c")]
    broken = next(iter(TrainStream(make_order([write_tar(tmp_path / "x/0.tar", members)]), preparation, 3)))
    whole = next(iter(TrainStream(make_order([write_tar(tmp_path / "y/0.tar", repaired)]), preparation, 3)))
    assert "b" in whole.keys and "b" not in broken.keys
    assert torch.equal(broken.draws.noise_BCHW, whole.draws.noise_BCHW)
    assert broken.rejects == {"broken picture": 1}


@pytest.mark.parametrize(("batch", "world", "workers"), [(1, 1, 1), (3, 2, 1), (2, 2, 2), (5, 3, 4)])
def test_validation_shares_are_disjoint_and_count_dirt_once(
    dirty: tuple[str, Content], make_order, preparation, batch: int, world: int, workers: int
) -> None:
    shares = validate(make_order([dirty[0]]), preparation, batch, world=world, workers=workers)
    batches = [batch for share in shares for batch in share]
    assert sorted(keys(batches)) == sorted(dirty[1].good)
    if (batch, world) == (1, 1):
        assert counted(batches) == dirty[1].rejects


def test_a_broken_tar_gives_the_samples_before_the_break_and_is_logged_once(
    clean_shards, make_order, preparation, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(clean_shards[1])
    path.write_bytes(path.read_bytes()[: 512 * 6 * 2 + 100])  # two samples of six blocks, and a bit
    with caplog.at_level(logging.WARNING):
        order = make_order(clean_shards)
        seen = list(islice(TrainStream(order, preparation, 17), 3))
    assert [counted([batch]) for batch in seen] == [{"broken tar": 1}] * 3
    assert {key for key in keys(seen) if key.startswith("00001")} == {"000010000", "000010001"}
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("members", "counts"),
    [
        ([(f"{i}.png", png()) for i in range(3)], "3 × no caption"),
        ([m for i in range(3) for m in ((f"{i}.txt", b"x"), (f"{i}.png", b"x"))], "3 × broken picture"),
        ([("0.txt", b"x"), ("1.txt", b"x"), ("1.png", b"x")], "1 × .*picture: .*1 × .*picture"),
        ([], "they are empty"),
    ],
)
def test_nothing_good_is_an_error_with_counts(make_order, preparation, tmp_path, members, counts) -> None:
    order = make_order([write_tar(tmp_path / "0.tar", members)])
    with pytest.raises(NoGoodSamples, match=f"data.train: no usable sample in a whole pass over 1 shards \\({counts}"):
        next(iter(TrainStream(order, preparation, 2)))
    with pytest.raises(NoGoodSamples, match=f"\\({counts}"):
        list(ValStream(order, preparation, 2))
