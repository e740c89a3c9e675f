"""A real Slurm, two nodes made of network namespaces, and the tiny world of tests/training to train in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm as slurm_here
from trainings import TinyRuns, training_conftest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


TRAINING = training_conftest()
world = TRAINING.world


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """That log, adapter files and last checkpoint of two runs are the same to the bit."""
    return TRAINING.assert_same_run


@pytest.fixture
def tiny_runs(world: Any, tmp_path: Path) -> TinyRuns:
    """What a training in the tiny world is told, and what it left; runs are in ``tmp_path/runs``."""
    return TinyRuns(world.overrides(), tmp_path)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_here.Slurm]:
    """Two nodes of two CPUs; jobs find the Python that runs the tests as ``$PYTHON``, and have one thread a process."""
    reason = slurm_here.missing()
    if reason is not None:
        pytest.skip(reason)
    with slurm_here.Slurm(tmp_path_factory.mktemp("slurm") / "here") as running:
        running.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        running.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        yield running
