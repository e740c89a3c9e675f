"""An epoch over dirty shards: every good sample exactly once, every bad one under its reason, nothing crashes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from dirt import KINDS, Content, write_dirty_shard
from torch.utils.data import DataLoader

from ipa.data.addresses import NO_DROPS
from ipa.data.images.preparation import ImagePreparation
from ipa.data.order.sequence import Order
from ipa.data.rejects import Tally
from ipa.data.shards.source import ShardSource
from ipa.tools.inspect.findings import Reading

PREPARATION = ImagePreparation(16, 16, (1, 2, 2), NO_DROPS)


def audit(shards: list[str], workers: int) -> tuple[Counter[str], Counter[str]]:
    """How often each key came, and the rejects, with real data workers."""
    keys, rejects = Counter[str](), Counter[str]()
    reading = Reading(Order([ShardSource.of("train", shards=shards)], seed=0), PREPARATION)
    for seen, found in DataLoader(reading, batch_size=None, num_workers=workers):
        keys.update([seen.key] if seen else [])
        rejects.update(Tally.of(found).counts)
    return keys, rejects


def check(folder: Path, shards: int, samples: int) -> None:
    """Every tenth shard breaks in the middle."""
    contents = [
        write_dirty_shard(folder / f"{i:05d}.tar", i, samples, share=0.03 if samples > 100 else 0.4, broken=i % 10 == 3)
        for i in range(shards)
    ]
    whole = sum_up(contents)
    assert len(whole.rejects) >= 8 and len(KINDS) + 2 >= 10

    keys, rejects = audit([str(folder / f"{i:05d}.tar") for i in range(shards)], workers=2)

    assert keys == Counter(whole.good)
    assert set(keys.values()) == {1}
    assert rejects == whole.rejects


def sum_up(contents: list[Content]) -> Content:
    good = [key for content in contents for key in content.good]
    return Content(good, sum((content.rejects for content in contents), Counter()))


def test_a_small_epoch(tmp_path: Path) -> None:
    check(tmp_path, shards=7, samples=60)


@pytest.mark.slow
def test_two_hundred_thousand_pictures(tmp_path: Path) -> None:
    check(tmp_path, shards=200, samples=1000)
