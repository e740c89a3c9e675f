"""Tiny real shards: numbered plain pictures with captions, and every kind of dirt."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from dirt import Content, write_dirty_shard
from tars import good, write_tar

from ipa.data.addresses import DropRates
from ipa.data.images.preparation import ImagePreparation
from ipa.data.images.transforms import Background
from ipa.data.order.sequence import Order
from ipa.data.shards.source import ShardSource


@pytest.fixture
def clean_shards(tmp_path: Path) -> list[str]:
    """Three shards of 7, 5 and 8 samples, keys ``<shard><index>``."""
    sizes = (7, 5, 8)
    return [
        write_tar(tmp_path / f"{s:05d}.tar", [m for i in range(size) for m in good(f"{s:05d}{i:04d}")])
        for s, size in enumerate(sizes)
    ]


@pytest.fixture
def dirty(tmp_path: Path) -> tuple[str, Content]:
    """A shard with four good samples between ten of seven bad kinds, and what must become of them."""
    path = tmp_path / "dirty.tar"
    return str(path), write_dirty_shard(path, 8, samples=14, share=0.6)


@pytest.fixture
def preparation() -> ImagePreparation:
    return ImagePreparation(8, 6, (2, 3, 3), DropRates(), Background(), max_pixels=10_000)


@pytest.fixture
def make_order() -> Callable[..., Order]:
    def make(shards: Sequence[str], seed: int = 0, window: int = 6) -> Order:
        return Order([ShardSource.of("train", shards=list(shards))], seed, window)

    return make
