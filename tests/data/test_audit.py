"""An epoch over dirty shards: every good sample exactly once, every bad one under its reason, nothing crashes."""

from collections import Counter
from pathlib import Path

import pytest
from dirt import write_dirty_shard
from torch.utils.data import DataLoader

from ipa.data.addresses import NO_DROPS
from ipa.data.images.preparation import ImagePreparation
from ipa.data.order.sequence import Order
from ipa.data.rejects import Tally
from ipa.data.shards.source import ShardSource
from ipa.tools.inspect.findings import Reading

PREPARATION = ImagePreparation(16, 16, (1, 2, 2), NO_DROPS)


@pytest.mark.parametrize(
    ("shards", "samples", "share"), [(7, 60, 0.4), pytest.param(200, 1000, 0.03, marks=pytest.mark.slow)]
)
def test_an_epoch_through_real_data_workers(shards: int, samples: int, share: float, tmp_path: Path) -> None:
    """Every tenth shard breaks in the middle."""
    contents = [
        write_dirty_shard(tmp_path / f"{i:05d}.tar", i, samples, share=share, broken=i % 10 == 3) for i in range(shards)
    ]
    expected = sum((content.rejects for content in contents), Counter())
    assert len(expected) >= 8
    keys, rejects = Counter[str](), Counter[str]()
    reading = Reading(Order([ShardSource.of("train", shards=str(tmp_path))], seed=0), PREPARATION)
    for seen, found in DataLoader(reading, batch_size=None, num_workers=2):
        keys.update([seen.key] if seen else [])
        rejects.update(Tally.of(found).counts)

    assert keys == Counter(key for content in contents for key in content.good)
    assert set(keys.values()) == {1}
    assert rejects == expected
