"""A real Slurm, two nodes made of network namespaces, and the tiny world of tests/training to train in."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import slurm as slurm_here
from trainings import TinyRuns, World

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def training_fixtures() -> ModuleType:
    """tests/training/conftest.py under a name of its own, since pytest has one ``conftest`` at a time."""
    spec = importlib.util.spec_from_file_location("training_fixtures", HERE.parent / "training/conftest.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


world = training_fixtures().world


@pytest.fixture
def tiny_runs(world: World, tmp_path: Path) -> TinyRuns:
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
