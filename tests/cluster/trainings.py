"""The trainings of these tests, in the tiny world of tests/training, and what they write."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from slurm import wait_until

from ipa.training.checkpointing import checkpoints_in, step_of

STEPS = 90
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
    "checkpoint.keep_last=1",  # a stop has a step of its own
    "data.batch_size=2",
    "data.num_workers=1",
]
ON_CPUS = ["trainer.accelerator=cpu", "trainer.precision=32-true"]


def training_conftest() -> Any:
    """tests/training/conftest.py under a name of its own, since pytest has one ``conftest`` at a time."""
    place = Path(__file__).resolve().parents[1] / "training/conftest.py"
    spec = importlib.util.spec_from_file_location("training_conftest", place)
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


class TinyRuns:
    def __init__(self, world: list[str], folder: Path) -> None:
        self.folder = folder
        self.overrides = [*world, *LEAN, *ON_CPUS, f"paths.runs={folder / 'runs'}"]


def newest_step(run: Path) -> int:
    """Of its checkpoints; 0 if there are none."""
    return max(map(step_of, checkpoints_in(run / "checkpoints")), default=0)


def wait_for_step(run: Path, step: int) -> None:
    """Until there is a checkpoint of this step or a later one."""
    wait_until(lambda: newest_step(run) >= step, f"a checkpoint of step {step} in {run}", PATIENCE_S)


def steps_made(run: Path) -> int:
    """As its summary says, which is written at the end."""
    return json.loads((run / "summary.json").read_text())["steps"]
