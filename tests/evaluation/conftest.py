"""A folder of image prompts, an adapter file on the tiny base, and the command in this process."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tiny_flow
import torch
from composing import composed
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image

import ipa.cli  # noqa: F401  (the resolvers that conf/ uses)
from ipa.evaluation.run import evaluate
from ipa.export.published import to_published, write_adapter

SIZES = [(40, 30), (30, 40), (32, 32), (20, 50), (33, 31)]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of several sizes, the third without caption."""
    folder, draw = tmp_path_factory.mktemp("prompts"), random.Random(0)
    for number, size in enumerate(SIZES):
        small = Image.frombytes("RGB", (3, 3), draw.randbytes(27))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"picture{number}.png")
        if number != 2:
            (folder / f"picture{number}.txt").write_text(f"thing {number}\nanother word for it\n")
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, clip_name: str) -> Path:
    """An adapter that knows its base and encoder, and does something."""
    path = tmp_path_factory.mktemp("adapter") / "mine.safetensors"
    tiny.write_adapter(path, {"base": str(base_folder), "encoder": clip_name})
    return path


def make_flow_adapter(name: str, clip_name: str, folder: Path) -> Path:
    """The same for a tiny transformer of this family."""
    model = tiny.shake(tiny_flow.make_model(tiny_flow.MAKERS[name]))
    base = tiny_flow.save(model.family, folder / "base")
    tensors = to_published(model.trainable.state_dict(), torch.float16, model.family.branches)
    write_adapter(folder / "mine.safetensors", tensors, {**model.describe(), "base": base, "encoder": clip_name})
    return folder / "mine.safetensors"


def compose(*overrides: str) -> DictConfig:
    """The configuration of `python evaluate.py`, as Hydra would hand it to the command."""
    cfg = composed("evaluate", *overrides, "hydra.runtime.output_dir=.")
    HydraConfig.instance().set_config(cfg)
    OmegaConf.resolve(cfg.paths)
    with open_dict(cfg):
        out = cfg.out
        cfg.pop("hydra")
        cfg.out = out
    return cfg


Run = Callable[..., Path]


@pytest.fixture
def run(prompts: Path, adapter: Path, clip_name: str, tmp_path: Path) -> Run:
    """Evaluate with overrides; returns the folder of the results."""

    def run(*overrides: str) -> Path:
        evaluate(compose(*usual(prompts, adapter, clip_name, tmp_path / "out"), *overrides))
        return tmp_path / "out"

    return run


@pytest.fixture(scope="session")
def evaluated(prompts: Path, adapter: Path, clip_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of ``label=x``; not to be changed."""
    out = tmp_path_factory.mktemp("evaluated")
    evaluate(compose(*usual(prompts, adapter, clip_name, out), "label=x"))
    return out


@pytest.fixture
def out(evaluated: Path, tmp_path: Path) -> Path:
    """A copy of them where ``run`` writes."""
    return Path(shutil.copytree(evaluated, tmp_path / "out"))


def usual(prompts: Path, adapter: Path, clip_name: str, out: Path) -> list[str]:
    sampling = ["sampling.num_steps=2", "sampling.guidance=2"]
    benchmark = ["benchmark=folder", f"benchmark.folder={prompts}", "num_seeds=2", "batch_size=4", *sampling]
    judge = [f"judge.name={clip_name}", "judge.pretrained=null", "~metrics.dinov2"]
    return [*benchmark, *judge, f"adapter={adapter}", f"out={out}", "device=cpu"]
