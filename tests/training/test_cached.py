"""A training on feature shards, from the configuration to the adapter file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from composing import composed
from conftest import QUIET, SCORED, Run, World, checkpoint, column

from ipa.data.cache.format import CacheWriter, WrongCache
from ipa.data.cache.source import read_header
from ipa.tools.precompute.run import precompute


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    out = tmp_path_factory.mktemp("features")
    own = [f"out={out}", "keep=[pooled,reference]", "device=cpu", "num_workers=0", "data.background=null"]
    precompute(composed("precompute", *world.overrides(), *own))
    return out


@pytest.mark.parametrize(
    ("experiment", "precision"),
    [
        pytest.param("decoupled_global", "32-true", marks=pytest.mark.slow),
        ("decoupled_fine_grained", "bf16-mixed"),
        pytest.param("simple_global", "32-true", marks=pytest.mark.slow),
    ],
)
def test_it_trains_previews_and_scores(
    experiment: str, precision: str, features: Path, train_in: Run, tmp_path: Path
) -> None:
    parts = [f"experiment={experiment}", f"trainer.precision={precision}", "data=cache", f"data.train={features}"]
    few = [*SCORED, "image_prompt_check.every_n_steps=2"]
    folder = train_in(tmp_path / "run", *parts, *few)
    summary = json.loads((folder / "summary.json").read_text())

    assert summary["steps"] == 4 and summary["scores"].keys() == {"scale 0", "scale 1"}
    assert (folder / "adapter.safetensors").is_file() and list((folder / "previews").iterdir())
    assert all(math.isfinite(float(loss)) for loss in column(folder, "train/loss").values())
    assert set(column(folder, "image_prompt/gap")) == {2, 4}


@pytest.mark.slow
def test_it_resumes_where_it_stopped(features: Path, train_in: Run, tmp_path: Path) -> None:
    overrides = [*QUIET, "data=cache", f"data.train={features}", "data.lanes.ranks=1", "data.lanes.workers=1"]
    train_in(tmp_path / "parts", *overrides, "trainer.max_steps=2")
    parts = train_in(tmp_path / "parts", *overrides, "trainer.max_steps=5", "data.num_workers=1")
    whole = train_in(tmp_path / "whole", *overrides, "trainer.max_steps=5")

    assert column(parts, "train/loss") == column(whole, "train/loss")
    assert checkpoint(parts)["state_dict"].keys() == checkpoint(whole)["state_dict"].keys()


def test_a_foreign_shard_is_refused_in_one_message(features: Path, train_in: Run, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for shard in features.iterdir():
        (mixed / shard.name).symlink_to(shard)
    header = read_header(str(mixed / "00000.tar"))
    with (mixed / "00002.tar").open("wb") as file:
        CacheWriter(file, replace(header, fingerprints={**header.fingerprints, "vae": "x"})).close({})
    with pytest.raises(WrongCache, match=r"^\S*00002.tar was not made as .*: fingerprints vae: \"x\", here") as stopped:
        train_in(tmp_path / "run", "data=cache", f"data.train={mixed}", "data.num_workers=1")

    assert "Traceback" not in str(stopped.value)
