"""The overrides of the trainings in these tests, and what they write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from slurm import wait_until
from torch import Tensor

from ipa.training.checkpointing import checkpoints_in, read_checkpoint, step_of

STEPS = 60
EVERY_STEPS = 6
PATIENCE_S = 120.0

# the previews and scores of a tiny run would take most of its time
LEAN = [
    "preview.num_prompts=1",
    "preview.num_scored=1",
    "preview.every_n_steps=1000",
    "scoring=null",
    "image_prompt_check.every_n_steps=0",
    "~logger.wandb",
    "ema.decay=0.9",
    f"trainer.max_steps={STEPS}",
    f"checkpoint.every_n_steps={EVERY_STEPS}",
    "data.batch_size=2",
    "data.num_workers=1",
]
ON_CPUS = ["trainer.accelerator=cpu", "trainer.precision=32-true"]


class World(Protocol):
    """Of tests/training/conftest.py."""

    def overrides(self) -> list[str]: ...


class TinyRuns:
    def __init__(self, world: list[str], folder: Path) -> None:
        self.folder = folder
        self.overrides = [*world, *LEAN, *ON_CPUS, f"paths.runs={folder / 'runs'}"]

    def run_folder(self, name: object, experiment: str = "decoupled_global") -> Path:
        return self.folder / "runs" / experiment / str(name)


def newest_step(run: Path) -> int:
    """Of its checkpoints; 0 if there are none."""
    return max(map(step_of, checkpoints_in(run / "checkpoints")), default=0)


def wait_for_step(run: Path, step: int) -> None:
    """Until there is a checkpoint of this step or a later one."""
    wait_until(lambda: newest_step(run) >= step, f"a checkpoint of step {step} in {run}", PATIENCE_S)


def adapter(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter.safetensors")


def steps_made(run: Path) -> int:
    """As its summary says, which is written at the end."""
    return json.loads((run / "summary.json").read_text())["steps"]


def last_checkpoint(run: Path) -> dict[str, Any]:
    return read_checkpoint(checkpoints_in(run / "checkpoints")[0])


def same(first: Any, second: Any) -> bool:
    """Whether two trees of tensors and plain values are the same to the bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def assert_same_outcome(run: Path, other: Path) -> None:
    """Adapter, weights, average, optimizer and schedule, to the bit."""
    assert same(adapter(run), adapter(other))
    mine, others = last_checkpoint(run), last_checkpoint(other)
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert same(mine[part], others[part]), part
