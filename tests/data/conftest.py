"""Tiny real shards: numbered plain pictures with captions, and every kind of dirt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tars import Members, good, png, write_tar

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
def dirty_members() -> Members:
    """Four good samples, ``good0`` … ``good3``, between samples of every bad kind, ``bad…``; bad ones at both ends."""
    return [
        *[("bad0.txt", b"no picture")],
        *good("good0"),
        *[("bad1.txt", b"a caption"), ("bad1.jpg", b"<html>gone</html>")],
        *[("bad2.txt", b"a caption"), ("bad2.png", png()[:50])],
        *good("good1"),
        *[("bad3.txt", b" \n"), ("bad3.png", png())],
        *[("bad4.txt", b"caf\xe9"), ("bad4.png", png())],
        *good("good2"),
        *good("good0", "the same key again"),
        *[("bad5.txt", b"a caption"), ("bad5.png", png((300, 200)))],
        *good("good3"),
        *[("bad6.png", png())],
    ]


@pytest.fixture
def preparation() -> ImagePreparation:
    return ImagePreparation(8, 6, (2, 3, 3), DropRates(), Background(), max_pixels=10_000)


@pytest.fixture
def make_order() -> Callable[..., Order]:
    def make(shards: Sequence[str], seed: int = 0, window: int = 6) -> Order:
        return Order([ShardSource.of("train", shards=list(shards))], seed, window)

    return make
