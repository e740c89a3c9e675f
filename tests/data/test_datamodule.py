"""The whole way, through real loaders and a real trainer."""

import logging
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from tars import good, png, write_tar

from ipa.data.datamodule import ShardDataModule
from ipa.data.order.lanes import Lanes, Share
from ipa.data.rejects import NoGoodSamples
from ipa.data.shards.names import NoShards
from ipa.types import Batch, LanePlace, Position, SourcePlace

DEMO = Path(__file__).parents[2] / "demo" / "data"


ONE_LANE = {"ranks": 1, "workers": 1}


def make(train: object, val: object = None, **options: object) -> ShardDataModule:
    """With one lane, so that the order is the same for any number of workers."""
    usual = {"batch_size": 4, "num_workers": 0, "window": 6, "lanes": ONE_LANE}
    data = ShardDataModule(train, val, **{**usual, **options})
    data.fit_to(image_size_px=8, reference_size_px=6, latent_shape=(2, 3, 3))
    return data


def seen(batch: Batch) -> tuple:
    return batch.keys, batch.draws.noise_BCHW.flatten().tolist(), batch.draws.time_B.tolist()


def take(data: ShardDataModule, number: int) -> list[tuple]:
    """Consume ``number`` batches, fetching more."""
    batches = list(islice(data.train_dataloader(), number + 2))[:number]
    for batch in batches:
        data.consumed(batch)
    return [seen(batch) for batch in batches]


def test_a_loader_iterated_again_continues(clean_shards: list[str]) -> None:
    whole = take(make(clean_shards), 6)
    data = make(clean_shards, num_workers=2)
    loader, parts = data.train_dataloader(), []
    for _ in range(3):  # each time with new workers
        for batch in islice(loader, 2):
            parts.append(seen(batch))
            data.consumed(batch)
    assert parts == whole


def test_another_order_begins_a_new_pass_and_other_sizes_are_logged(
    clean_shards: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    stopped, other = make(clean_shards), make(clean_shards, seed=1)
    take(stopped, 3)
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(stopped.state_dict())
    assert stopped.position == Position(3, {0: LanePlace(12, (SourcePlace(0, 0, 6, 6),))})
    assert other.position == Position(3, {0: LanePlace(0, (SourcePlace(1),))})
    assert "new pass" in caplog.text
    caplog.clear()
    make(clean_shards).load_state_dict(stopped.state_dict())
    assert not caplog.records
    make(clean_shards, batch_size=2).load_state_dict(stopped.state_dict())
    assert "a step had 4 samples, now it has 2; global_batch_size=4 keeps it" in caplog.text


@pytest.mark.parametrize(
    ("lanes", "number", "workers_after"), [(ONE_LANE, 1, 1), (None, 2, 0), ({"ranks": None, "workers": 3}, 3, 0)]
)
def test_a_resumed_run_keeps_its_lanes_and_continues_after_the_last_consumed_batch(
    clean_shards: list[str], lanes: dict[str, int] | None, number: int, workers_after: int
) -> None:
    """A run that begins has a lane for every worker, unless told otherwise."""
    whole = take(make(clean_shards, num_workers=0 if lanes else 2, lanes=lanes), 9)
    stopped = make(clean_shards, num_workers=2, lanes=lanes)
    take(stopped, 4)
    stopped.rejected.counts["no caption"] = 3
    resumed = make(clean_shards, num_workers=workers_after, lanes=lanes)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.rejected.counts == {"no caption": 3} and take(resumed, 5) == whole[4:]
    assert resumed.lanes == Lanes(1, number)


def test_a_second_checkpoint_of_several_ranks_keeps_what_each_of_them_read(clean_shards, monkeypatch) -> None:
    """After a resume every rank knows all lanes' places, those of the others' lanes as they were."""
    saved = {
        "step": 4,
        "lanes": {lane: [8, [[0, 0, 0, 4]]] for lane in range(2)},
        "grid": [2, 1],
        "step_samples": 8,
        "readers": [2, 1],
        "order": make(clean_shards).fingerprint(),
        "rejects": {"broken picture": 5},
    }
    ranks = [make(clean_shards, lanes=None) for _ in range(2)]
    for rank, data in enumerate(ranks):
        monkeypatch.setattr(data, "share", lambda rank=rank: Share(rank, 2))
        data.load_state_dict(saved)
        data.position.step = 6
        data.position.lanes[rank] = LanePlace(10, (SourcePlace(0, 0, 0, 6),))
        data.rejected.counts["no caption"] += 1
    parts = {Counter: [data.rejected.counts for data in ranks], dict: [data.position.lanes for data in ranks]}
    monkeypatch.setattr("ipa.data.datamodule.gather", lambda part: parts[type(part)])

    state = ranks[0].state_dict()

    assert state["lanes"] == {lane: [10, [[0, 0, 0, 6]]] for lane in range(2)}
    assert state["rejects"] == {"broken picture": 5, "no caption": 2}  # whatever the number of ranks before and after


def test_lanes_that_a_step_cannot_be_shared_among_begin_a_new_pass(clean_shards, caplog) -> None:
    order = make(clean_shards).fingerprint()
    state = {"grid": [2, 1], "readers": [2, 1], "step": 5, "rejects": {}, "order": order, "step_samples": 3}
    state["lanes"] = {lane: [20, [[1, 0, 0, 3]]] for lane in range(2)}
    data = make(clean_shards, batch_size=3, lanes=None)
    data.load_state_dict(state)
    with caplog.at_level(logging.WARNING):
        data.train_dataloader()
    assert data.position == Position(5, {0: LanePlace(0, (SourcePlace(2),))}) and data.lanes == Lanes(1, 1)
    assert "a new pass (2): its order was made for 2 ranks, but 3 samples × 1 ranks are not a multiple" in caplog.text


@pytest.mark.parametrize(
    ("lanes", "complaint"),
    [({"ranks": 3, "workers": None}, "not a multiple of 3"), ({"ranks": 2, "workers": 2}, "only 3 shards")],
)
def test_lanes_that_cannot_be_are_refused(clean_shards: list[str], lanes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make(clean_shards, lanes=lanes).train_dataloader()


def test_sources_are_chosen_by_name(clean_shards: list[str]) -> None:
    one, other = {"shards": clean_shards[:2], "weight": 2}, {"shards": clean_shards[2]}
    known = {"one": one, "other": other, "none": {"shards": None}}
    data = make(None, sources=["other", "one"], known=known)
    assert [(source.name, source.weight) for source in data.train_order.sources] == [("other", 1.0), ("one", 2.0)]
    with pytest.raises(ValueError, match=r"data.sources=\['oen'\]: give one or several of one, other, none"):
        make(None, sources=["oen"], known=known)
    with pytest.raises(ValueError, match=r"give the shards: data.known.none.shards="):
        make(None, sources=["one", "none"], known=known)
    with pytest.raises(ValueError, match=r"no data are given: give data.train=SHARDS, or data.sources="):
        make(None, known=known)
    with pytest.raises(ValueError, match="both given"):
        make(clean_shards, sources=["one"], known=known)


def test_missing_shards_are_reported_at_once(tmp_path: Path, clean_shards: list[str]) -> None:
    with pytest.raises(NoShards, match="no such shard"):
        ShardDataModule(f"{tmp_path}/nowhere/*.tar")
    with pytest.raises(NoShards, match="no such shard"):
        ShardDataModule(clean_shards, f"{tmp_path}/nowhere/*.tar")
    with pytest.raises(NoShards, match="empty"):
        ShardDataModule([])
    assert make(clean_shards).val_dataloader() == []
    with pytest.raises(ValueError, match="fit_to"):
        ShardDataModule(clean_shards).train_dataloader()


def test_an_error_in_a_worker_reaches_training(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", [("a.png", b"")])
    batches = iter(make(shard, num_workers=1).train_dataloader())
    with pytest.raises(NoGoodSamples, match=r"1 × no caption: a of 0\.tar"):
        next(batches)
    batches._shutdown_workers()  # without it, the traceback that pytest keeps delays their end by ten seconds


def test_rejects_are_described_with_their_first_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of training once each pass is counted; validation, which nothing counts, is logged."""
    members = [*good("a"), ("b.txt", b"x"), ("b.png", b"<svg/>"), ("c.txt", b"x"), ("c.png", b"<svg/>"), *good("d")]
    shard = write_tar(tmp_path / "0.tar", members)
    data = make(shard, shard)
    with caplog.at_level(logging.WARNING):
        list(data.val_dataloader())
        take(data, 1)
    [line] = data.rejected.lines()
    assert re.fullmatch(
        r"2 × broken picture: [bc] of 0\.tar, [bc] of 0\.tar \(SVG is not read: convert it to PNG\)", line
    )
    for name in ("val", "train"):
        assert f"data.{name}: rejected, broken picture: " in caplog.text


def test_validation_through_workers_brings_every_sample_once_in_file_order(clean_shards: list[str]) -> None:
    loader = make(clean_shards, clean_shards, val_batch_size=3, num_workers=2).val_dataloader()
    batches = list(loader)
    assert [key for b in batches for key in b.keys] == [
        f"{s:05d}{i:04d}" for s, size in enumerate((7, 5, 8)) for i in range(size)
    ]
    assert [len(batch) for batch in batches] == [3] * 6 + [2] and batches[0].position is None
    assert not any(batch.draws.drop_text_B.any() or batch.draws.drop_image_B.any() for batch in batches)
    assert [seen(batch) for batch in loader] == [seen(batch) for batch in batches]


def test_a_batch_says_how_each_picture_was_cut(tmp_path: Path) -> None:
    sizes = [(10, 8), (8, 8), (30, 16), (9, 21)]
    members = [member for i, size in enumerate(sizes) for member in [(f"{i}.txt", b"a thing"), (f"{i}.png", png(size))]]
    shard = write_tar(tmp_path / "0.tar", members)
    batch = next(iter(make(shard, shard, num_workers=1).val_dataloader()))

    assert batch.size_B6.tolist() == [
        *([8, 10, 0, 1, 8, 8], [8, 8, 0, 0, 8, 8]),
        *([16, 30, 0, 4, 8, 8], [21, 9, 5, 0, 8, 8]),  # 15 × 8 and 8 × 18 before the cut
    ]
