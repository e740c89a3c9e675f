"""Sweeps with ``hydra/launcher=submitit_slurm`` on a real Slurm, and the message where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import forked
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from slurm import Slurm
from trainings import STEPS, TinyRuns, steps_made, wait_for_step

from ipa.slurm import submitit_options

ROOT = Path(__file__).resolve().parents[2]
TWO_EXPERIMENTS = ["experiment=decoupled_global,simple_global", "name=study"]
ON_SLURM = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10"]
NOWHERE = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(tiny_runs: TinyRuns, environment: Mapping[str, str], *options: str) -> subprocess.Popen[str]:
    """``python train.py -m`` in the tiny world."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "-m", *tiny_runs.overrides, *options],
        cwd=tiny_runs.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def sweep(tiny_runs: TinyRuns, environment: Mapping[str, str], *options: str) -> tuple[int, str]:
    """Exit code and output."""
    process = start(tiny_runs, environment, *options)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def submitted(process: subprocess.Popen[str], number: str) -> tuple[str, str]:
    """Slurm's id of the sweep's job with this number, and the output so far."""
    assert process.stdout is not None
    earlier = ""
    while (found := re.search(rf"Slurm's job (\d+_{number}),", line := process.stdout.readline())) is None:
        assert line, earlier
        earlier += line
    return found[1], earlier


@pytest.mark.slow
def test_two_experiments_run_on_slurm_and_leave_two_adapters(slurm: Slurm, tiny_runs: TinyRuns) -> None:
    """Each in its own job, one requeued in the middle. Other launchers find the same folders, both finished."""
    runs = [tiny_runs.folder / "runs/study" / name for name in ("decoupled_global", "simple_global")]
    process = start(tiny_runs, slurm.environment, *TWO_EXPERIMENTS, *ON_SLURM)
    first, earlier = submitted(process, "0")
    wait_for_step(runs[0], STEPS // 5)
    slurm.warn(first)
    output = process.communicate(timeout=240)[0]

    assert process.returncode == 0, earlier + output
    assert slurm.field(first, "Restarts") == "1"
    assert "2 of 2 jobs done" in output
    assert [steps_made(run) for run in runs] == [STEPS, STEPS]
    adapters = [load_file(run / "adapter.safetensors") for run in runs]
    assert adapters[0].keys() != adapters[1].keys()
    assert all(torch.isfinite(tensor).all() for tensors in adapters for tensor in tensors.values())

    code, output = sweep(tiny_runs, slurm.environment, *TWO_EXPERIMENTS, "hydra.launcher.jobs=2")
    assert code == 0 and output.count("is finished") == 2, output


@pytest.mark.slow
def test_failed_and_cancelled_jobs_are_reported(slurm: Slurm, tiny_runs: TinyRuns) -> None:
    """One at a time: the first fails; the second is cancelled before it starts, and has no exit code."""
    options = ["data.train=absent,elsewhere", "name=study", "hydra.launcher.array_parallelism=1"]
    process = start(tiny_runs, slurm.environment, *ON_SLURM, *options)
    second, earlier = submitted(process, "1")
    slurm.run("scancel", second)
    output, _ = process.communicate(timeout=240)

    assert process.returncode == 1
    assert "#0 0  failed with exit code 1" in output, output
    assert re.search(r"#1 1  failed with exit code 1, see .*/\.submitit/", output), output
    assert "Traceback" not in Path(re.findall(r"job \d+_0, (.*)", earlier)[0]).read_text()
    assert "absent" in (tiny_runs.folder / "runs/study/0/train.log").read_text()


@pytest.mark.slow
def test_messages_of_sbatch_are_shown(slurm: Slurm, tiny_runs: TinyRuns) -> None:
    options = [*TWO_EXPERIMENTS, *ON_SLURM, "hydra.launcher.partition=nowhere"]
    code, output = sweep(tiny_runs, slurm.environment, *options)

    assert code == 2
    assert "invalid partition specified: nowhere" in output and "Traceback" not in output


def test_where_there_is_no_slurm_the_sweep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    arguments = ["-m", *TWO_EXPERIMENTS, *ON_SLURM]
    result = forked.run(ROOT / "train.py", *arguments, cwd=tmp_path / "here", environment=NOWHERE)

    assert result.returncode == 2
    assert "no sbatch" in result.stderr and "hydra/launcher=processes" in result.stderr
    assert "Traceback" not in result.stderr
    assert not [path for path in (tmp_path / "here").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_jobs_that_share_a_process_have_one_device(tiny_runs: TinyRuns) -> None:
    """Hydra's own launcher runs all jobs in one process, which Lightning would start again for each device."""
    code, output = sweep(
        tiny_runs, NOWHERE, *TWO_EXPERIMENTS, "hydra/launcher=basic", "trainer=ddp", "trainer.devices=2"
    )

    assert code == 1
    assert "runs all jobs of a sweep in one process" in output
    assert "hydra/launcher=processes" in output and "submitit_slurm" in output


def test_options_reach_sbatch_by_its_own_names() -> None:
    """Options that are null are left to Slurm; a run gets the signal that it handles, and is requeued."""
    options = OmegaConf.load(ROOT / "conf/hydra/launcher/submitit_slurm.yaml")
    given = {name: options[name] for name in options if name not in ("_target_", "submitit_folder", "name")}
    given |= {"partition": "gpu", "gpus_per_node": 8}
    given["additional_parameters"].reservation = "mine"
    asked = submitit_options(given)

    assert (asked["slurm_partition"], asked["gpus_per_node"], asked["timeout_min"]) == ("gpu", 8, 1440)
    assert asked["slurm_additional_parameters"] == {"signal": "USR1@120", "requeue": True, "reservation": "mine"}
    assert "slurm_account" not in asked and "mem_gb" not in asked
    assert 'scontrol requeue "$SLURM_JOB_ID"' in "\n".join(asked["slurm_teardown"])

    given["additional_parameters"].requeue = False
    asked = submitit_options(given)
    assert "slurm_teardown" not in asked and "requeue" not in asked["slurm_additional_parameters"]
