"""The default name of a run."""

from __future__ import annotations

import time
from datetime import datetime

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from ipa import cli  # noqa: F401 - it makes the name known to the configuration
from ipa.identity import run_name

NOW = datetime(2026, 3, 4, 5, 6, 7)
SLURM = {"SLURM_JOB_ID": "812", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "2026-03-04_05-06-07"),
        (SLURM, "812"),
        ({**SLURM, "SLURM_ARRAY_JOB_ID": "800", "SLURM_ARRAY_TASK_ID": "12"}, "800_12"),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, "2026-03-04_05-06-07"),  # several runs start from one shell
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, "2026-03-04_05-06-07"),
        ({"TORCHELASTIC_RUN_ID": "night"}, "night"),
        ({"TORCHELASTIC_RUN_ID": "0d3c8a1b-7c7e-4b0e-9d51-3f3e0c7a1f00"}, "torchrun-0d3c8a1b"),
        ({**SLURM, "TORCHELASTIC_RUN_ID": "none"}, "812"),
    ],
)
def test_default_name(environment: dict[str, str], name: str) -> None:
    assert run_name(environment, NOW) == name


def test_a_group_of_processes_without_an_id_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name=NAME.*--rdzv-id"):
        run_name({"TORCHELASTIC_RUN_ID": "none"}, NOW)


def test_a_command_has_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is read once per command."""
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with hydra.initialize(config_path="../conf", version_base="1.3"):
        cfg = hydra.compose("train", ["hydra.runtime.output_dir=x"])
        first = cfg.name
        time.sleep(1.1)
        assert first == cfg.name == f"{datetime.strptime(first, '%Y-%m-%d_%H-%M-%S'):%Y-%m-%d_%H-%M-%S}"
    GlobalHydra.instance().clear()
