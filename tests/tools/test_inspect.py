"""What `python -m ipa.tools.inspect` reads and prints, and its contact sheet."""

import re
from collections import Counter
from pathlib import Path

import pytest
from composing import composed
from dirt import write_dirty_shard
from omegaconf import DictConfig
from PIL import Image
from tars import write_tar
from torch.utils.data import DataLoader

from ipa.data.addresses import NO_DROPS
from ipa.data.images.preparation import ImagePreparation
from ipa.data.order.sequence import Order
from ipa.data.rejects import Tally
from ipa.data.shards.source import ShardSource
from ipa.tools.inspect.findings import Reading, inspect


@pytest.fixture
def shard(tmp_path: Path) -> tuple[str, int, int]:
    """A dirty shard with its numbers of good and of bad samples."""
    content = write_dirty_shard(tmp_path / "00000.tar", 0, samples=50, share=0.4)
    return str(tmp_path / "00000.tar"), len(content.good), sum(content.rejects.values())


def compose(*overrides: str) -> DictConfig:
    return composed("inspect", *overrides)


def test_it_counts_and_draws(shard, base_folder: Path, clip_name: str, tmp_path: Path, capsys) -> None:
    path, good, bad = shard
    parts = [f"base.path={base_folder}", f"encoder.name={clip_name}", f"data.train={path}", "data.num_workers=0"]
    out = tmp_path / "sheet.png"

    inspect(compose(*parts, "samples=null", "pictures=5", f"out={out}"))

    said = capsys.readouterr().out
    assert f"{good} good samples, {bad} rejected" in said and "stopped at" not in said
    assert re.search(r"\d+ × caption is not UTF-8: \d+ of 00000\.tar \(txt: byte 3 is 0xe9\)", said)
    assert re.search(r"\d+ × broken picture: .*it is a web page", said) and "upscaled" not in said
    assert "shorter side (px): median 48" in said
    sheet = Image.open(out)
    assert sheet.width > 4 * 256 and sheet.height > 2 * 128  # two rows of four pairs


def test_big_recipes_need_no_weights(shard, clip_name: str, tmp_path: Path, capsys) -> None:
    path, _, _ = shard
    parts = ["recipe=sd15", "image_size_px=64", f"data.train={path}", "data.num_workers=0", "data.buckets=sdxl"]

    inspect(compose(*parts, "samples=10", "pictures=2", f"out={tmp_path / 'x.png'}"))

    said = capsys.readouterr().out
    assert (
        "10 good samples" in said
        and "; stopped at samples=10\n" in said
        and "10 of them (100 %) are smaller than" in said
        and "upscaled" in said
    )


@pytest.mark.parametrize("content", ["<html>", "cache"])
def test_nothing_good_is_an_error(tmp_path: Path, base_folder: Path, clip_name: str, content: str) -> None:
    (tmp_path / "0.tar").write_text(content)
    if content == "cache":
        write_tar(tmp_path / "0.tar", [("cache.header.json", b"{}"), ("1.safetensors", b""), ("2.safetensors", b"")])
    parts = [f"base.path={base_folder}", f"encoder.name={clip_name}", "data.num_workers=0"]
    with pytest.raises(ValueError, match="no good sample") as error:
        inspect(compose(*parts, f"data.train={tmp_path}/0.tar", f"out={tmp_path / 'x.png'}"))
    assert ("feature cache, which data=cache reads" in str(error.value)) == (content == "cache")


@pytest.mark.parametrize(
    ("shards", "samples", "share"), [(7, 60, 0.4), pytest.param(200, 1000, 0.03, marks=pytest.mark.slow)]
)
def test_an_epoch_through_real_data_workers(shards: int, samples: int, share: float, tmp_path: Path) -> None:
    """Every good sample comes exactly once, every bad one is counted; every tenth shard breaks in the middle."""
    contents = [
        write_dirty_shard(tmp_path / f"{i:05d}.tar", i, samples, share=share, broken=i % 10 == 3) for i in range(shards)
    ]
    expected = sum((content.rejects for content in contents), Counter())
    assert len(expected) >= 8
    keys, rejects = Counter[str](), Counter[str]()
    reading = Reading(
        Order([ShardSource.of("train", shards=str(tmp_path))], seed=0), ImagePreparation(16, 16, (1, 2, 2), NO_DROPS)
    )
    for seen, found in DataLoader(reading, batch_size=None, num_workers=2):
        keys.update([seen.key] if seen else [])
        rejects.update(Tally.of(found).counts)

    assert keys == Counter(key for content in contents for key in content.good)
    assert set(keys.values()) == {1}
    assert rejects == expected
