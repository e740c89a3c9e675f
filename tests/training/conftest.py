"""A tiny world, and a way to train in it: the real configuration, real classes, real files."""

from __future__ import annotations

import csv
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from composing import composed
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tars import saved, write_tar

from ipa.cli import quiet_libraries
from ipa.ranges import check
from ipa.training.checkpointing import checkpoints_in, read_checkpoint
from ipa.training.run import train

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 24
HELDOUT = 6

EXPERIMENTS = ["decoupled_global", "decoupled_fine_grained", "simple_global", "simple_fine_grained"]
# both kinds and both heads; the other combinations take as long again
SOME_EXPERIMENTS = [
    pytest.param(name, marks=pytest.mark.slow if name in EXPERIMENTS[1:3] else ()) for name in EXPERIMENTS
]
QUIET = ("data.val=null", "scoring=null", "image_prompt_check.every_n_steps=0")
FEW = ("scoring=null", "preview.num_prompts=1", "preview.num_scored=2")
SCORED = (*FEW[1:], "scoring.num_prompts=2")
SIX = ("trainer.max_steps=6", "image_prompt_check.every_n_steps=2", *FEW)
PAIRS = ("data.pairs.by=style", "data.pairs.self=0.25")
# everything that a step can have at once; six steps of it are two passes over the data
EVERYTHING = (
    "trainer.max_steps=6",
    "trainer.accumulate_grad_batches=2",
    "trainer.gradient_clip_val=0.5",
    "schedule=cosine",
    "schedule.num_warmup_steps=2",
    "ema.decay=0.9",
    "optimizer.lr=0.02",
    "image_prompt_check.every_n_steps=2",
)

Members = Iterable[tuple[str, bytes]]


def picture(seed: int, transparent: bool = False) -> bytes:
    """A disc on a plain or transparent ground, as PNG."""
    draw = random.Random(seed)
    colours = [tuple(draw.randrange(256) for _ in range(3)) for _ in range(2)]
    image = Image.new("RGBA", (20, 24), (0, 0, 0, 0) if transparent else colours[0])
    ImageDraw.Draw(image).ellipse((4, 6, 15, 17), fill=colours[1])
    return saved(image, "PNG")


def sample(number: int) -> Members:
    key = f"{number:09d}"
    content = {"json": b'{"style": "style%d"}' % (number % 4), "txt": f"thing {number}".encode()}
    content["png"] = picture(number, transparent=number % 3 == 0)
    return [(f"{key}.{extension}", data) for extension, data in content.items()]


def write_shard(path: Path, members: Members) -> Path:
    return Path(write_tar(path, members))


def samples(numbers: Iterable[int]) -> Members:
    return [member for number in numbers for member in sample(number)]


@dataclass(frozen=True)
class World:
    """Names of the parts, as the configuration takes them."""

    base: str
    encoder: str
    judge: str
    train: str
    heldout: str

    def overrides(self) -> list[str]:
        return [
            f"base.path={self.base}",
            f"encoder.name={self.encoder}",
            f"judge.name={self.judge}",
            f"data.train={self.train}",
            f"data.val={self.heldout}",
            "data.batch_size=4",
            "data.num_workers=0",
            "optimizer=adamw",  # that of the other recipes, and the only one that works with all trainers
            "optimizer.lr=0.001",
            "schedule=constant",
            "schedule.num_warmup_steps=0",
            "ema.decay=null",
            "resampler.width=16",
            "resampler.heads=1",
            "trainer.max_steps=4",
            "trainer.log_every_n_steps=1",
            "preview.every_n_steps=2",
            "sampling.num_steps=1",
            "preview.num_prompts=3",
            "preview.num_scored=4",
            "scoring.num_prompts=4",
        ]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, clip_name: str) -> World:
    return make_world(tmp_path_factory.mktemp("world"), str(base_folder), clip_name)


def make_world(folder: Path, base: str, encoder: str) -> World:
    """Shards and a judge in ``folder``."""
    for shard in range(2):
        numbers = range(shard * SAMPLES // 2, (shard + 1) * SAMPLES // 2)
        write_shard(folder / "train" / f"{shard:05d}.tar", samples(numbers))
    write_shard(folder / "heldout" / "00000.tar", samples(range(100, 100 + HELDOUT)))
    judge = tiny.save_clip(folder / "judge", seed=1)
    return World(base, encoder, judge, str(folder / "train"), str(folder / "heldout"))


def compose(folder: Path, *overrides: str) -> DictConfig:
    """The real configuration for a run in ``folder``, as Hydra would hand it to the command."""
    cfg = composed("train", *overrides, f"hydra.runtime.output_dir={folder}", f"name={folder.name}")
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        cfg.pop("hydra")
    check(cfg)
    return cfg


def run_training(folder: Path, *overrides: str) -> Path:
    """Train in this process, in the folder given; returns the folder."""
    quiet_libraries()
    try:
        train(compose(folder, *overrides))
    finally:
        GlobalHydra.instance().clear()
    return folder


Run = Callable[..., Path]


@pytest.fixture(scope="session")
def train_in(world: World) -> Run:
    """``run_training`` in the tiny world without wandb."""

    def run(folder: Path, *overrides: str) -> Path:
        return run_training(folder, *world.overrides(), "~logger.wandb", *overrides)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, train_in: Run) -> Path:
    """The folder of a run of four steps that ended well; only to be read."""
    return train_in(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def variant(tmp_path_factory: pytest.TempPathFactory, train_in: Run) -> Callable[[str], Path]:
    """The folder of a run of an experiment with ``EVERYTHING``, scored; only to be read."""
    place = tmp_path_factory.mktemp("variants")
    return cache(lambda name: train_in(place / name, f"experiment={name}", *EVERYTHING))


@pytest.fixture(scope="session")
def six(tmp_path_factory: pytest.TempPathFactory, train_in: Run) -> Path:
    """A run of ``SIX`` without a stop, one pass over the data; only to be read."""
    return train_in(tmp_path_factory.mktemp("runs") / "six", *SIX)


@pytest.fixture(scope="session")
def first_four(tmp_path_factory: pytest.TempPathFactory, train_in: Run) -> Path:
    """The first four steps of ``SIX``; only to be read."""
    return train_in(tmp_path_factory.mktemp("runs") / "four", *SIX, "trainer.max_steps=4")


@pytest.fixture
def half_done(first_four: Path, tmp_path: Path) -> Path:
    """A copy of ``first_four`` in another place."""
    return Path(shutil.copytree(first_four, tmp_path / "half"))


Command = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(world: World, tmp_path: Path) -> Command:
    """`python train.py` in a process of its own; its run folder is ``tmp_path/runs/decoupled_global/x``."""

    def start(*overrides: str, setup: str = "", **environment: str) -> subprocess.Popen[str]:
        arguments = [*world.overrides(), f"paths.runs={tmp_path / 'runs'}", "name=x", *overrides]
        script = f"import runpy, sys; sys.argv = {['train.py', *arguments]!r}; {setup}; "
        script += f"sys.argv[0] = {str(ROOT / 'train.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-c", script] if setup else [sys.executable, str(ROOT / "train.py"), *arguments]
        inherited = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
        variables = {
            **inherited,
            "HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
            "PYTHONIOENCODING": "utf-8",
            # under a limit on file sizes Python would leave half a compiled module
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        }
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    answer = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if answer.returncode:
        pytest.skip(f"no file system can be mounted here: {answer.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def rows(folder: Path) -> list[dict[str, str]]:
    """``log.csv`` of a run."""
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> dict[int, str]:
    """Step → value, for the steps that have one."""
    return {int(row["step"]): row[name] for row in rows(folder) if row.get(name)}


def last_checkpoint(folder: Path) -> Path:
    """The newest of a run."""
    return checkpoints_in(folder / "checkpoints")[0]


def checkpoint(folder: Path) -> dict[str, Any]:
    """The content of the newest of a run."""
    return read_checkpoint(last_checkpoint(folder))


def saved_configuration(folder: Path) -> DictConfig:
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    return cfg


COMPARED = ("train/loss", "train/lr", "train/grad_norm", "image_prompt/gap", "preview/clip_i", "preview/border_lab")


def trained(folder: Path) -> dict[str, Any]:
    """Weights, their average, optimizer and schedule of the last checkpoint."""
    saved = checkpoint(folder)
    return {**saved["state_dict"], **saved["optimizer_states"][0]["state"], "schedule": saved["lr_schedulers"]}


def assert_same_run(one: Path, other: Path) -> None:
    """Log, adapter files and last checkpoint are the same to the bit."""
    for name in COMPARED:
        assert column(one, name) == column(other, name)
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(other)]
    for pattern in ("*.safetensors", "checkpoints/*"):
        names = [sorted(path.name for path in folder.glob(pattern)) for folder in (one, other)]
        assert names[0] == names[1]
    for file in one.glob("*.safetensors"):
        torch.testing.assert_close(load_file(file), load_file(other / file.name), rtol=0, atol=0)
    torch.testing.assert_close(trained(one), trained(other), rtol=0, atol=0)


def rewound(folder: Path, place: Path) -> Path:
    """A copy of a run as it is when it is killed before its last checkpoint; the log may have later rows."""
    copy = Path(shutil.copytree(folder, place))
    last_checkpoint(copy).unlink()
    for name in ("summary.json", "adapter.safetensors", "adapter_raw.safetensors"):
        (copy / name).unlink(missing_ok=True)
    return copy
