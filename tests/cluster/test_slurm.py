"""Training under a real Slurm, with the scripts of docs/cluster.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from slurm import Slurm, wait_until
from trainings import EVERY_STEPS, PATIENCE_S, STEPS, TinyRuns, newest_step, steps_made, wait_for_step

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "docs/cluster/train.sbatch"
TORCHRUN = ROOT / "docs/cluster/torchrun.sbatch"
# options for a cluster without GPUs, in place of the scripts'
NO_GPUS = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=10", "--mem=0"]
ONE_NODE = ["--nodes=1", "--ntasks-per-node=2"]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]


def output(job: int, tiny_runs: TinyRuns) -> str:
    return (tiny_runs.folder / f"slurm-{job}.out").read_text()


def submit(slurm: Slurm, tiny_runs: TinyRuns, *options: str, script: Path = TRAIN) -> tuple[int, Path]:
    """The job, and the folder of its run."""
    log = f"--output={tiny_runs.folder}/slurm-%j.out"
    job = slurm.submit(Path(script), log, *NO_GPUS, *options, cwd=ROOT, arguments=tiny_runs.overrides)
    wait_until(lambda: folders_of(job, tiny_runs), f"the folder of job {job}", PATIENCE_S)
    return job, folders_of(job, tiny_runs)[0]


def folders_of(job: int, tiny_runs: TinyRuns) -> list[Path]:
    """The folders of the runs that a job started without names."""
    return sorted(tiny_runs.folder.glob(f"runs/*/{job}-*"))


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    slurm: Slurm, tiny_runs: TinyRuns, assert_same_run: Callable[[Path, Path], None]
) -> None:
    """Stopped three times, the job resumes its own run; the other run has a node for each of its tasks."""
    job, run = submit(slurm, tiny_runs, *ONE_NODE)
    for times, disturb in enumerate([slurm.requeue, slurm.warn, lambda job: slurm.preempt()], 1):
        wait_for_step(run, times * STEPS // 5)
        disturb(job)
        wait_until(lambda: slurm.state(job) == "PENDING", f"job {job} pending", PATIENCE_S)
        assert times * STEPS // 5 <= newest_step(run) < STEPS, output(job, tiny_runs)

    assert slurm.wait_for_end(job, PATIENCE_S) == "COMPLETED", output(job, tiny_runs)
    assert slurm.field(job, "Restarts") == "3"
    whole, undisturbed = submit(slurm, tiny_runs, *TWO_NODES)
    assert slurm.wait_for_end(whole, PATIENCE_S) == "COMPLETED", output(whole, tiny_runs)
    assert steps_made(run) == steps_made(undisturbed) == STEPS
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_torchrun_on_each_node_handles_signals_as_well(slurm: Slurm, tiny_runs: TinyRuns) -> None:
    """Its workers get the signal and write a checkpoint, and the job resumes under the same name."""
    job, run = submit(slurm, tiny_runs, *TWO_NODES, "--export=ALL,GPUS_PER_NODE=1", script=TORCHRUN)
    for times, disturb in enumerate([slurm.warn, lambda job: slurm.preempt()], 1):
        wait_for_step(run, times * STEPS // 5)
        disturb(job)
        wait_until(lambda: slurm.state(job) == "PENDING", f"job {job} pending", PATIENCE_S)
        assert times * STEPS // 5 <= newest_step(run) < STEPS, output(job, tiny_runs)

    assert slurm.wait_for_end(job, PATIENCE_S) == "COMPLETED", output(job, tiny_runs)
    assert slurm.field(job, "Restarts") == "2"
    assert steps_made(run) == STEPS


@pytest.mark.slow
def test_cancelled_run_stays_cancelled(slurm: Slurm, tiny_runs: TinyRuns) -> None:
    job, run = submit(slurm, tiny_runs, *ONE_NODE)
    wait_for_step(run, EVERY_STEPS)
    slurm.run("scancel", str(job))

    assert slurm.wait_for_end(job, PATIENCE_S) == "CANCELLED"
    wait_until(lambda: not slurm.run("squeue", "--noheader", f"--jobs={job}"), f"job {job} gone", PATIENCE_S)
    assert slurm.state(job) == "CANCELLED" and slurm.field(job, "Restarts") == "0"
    assert newest_step(run) < STEPS, output(job, tiny_runs)


@pytest.mark.slow
def test_several_runs_of_a_job_have_folders_of_their_own_which_a_requeued_job_finds(
    slurm: Slurm, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    """The second is requeued in the middle; then the first is finished, and the second resumes."""
    script = tmp_path / "loop.sbatch"
    loop = 'for seed in 1 2; do srun --ntasks=1 "$PYTHON" train.py seed=$seed "$@"; done'
    script.write_text(f"#!/bin/bash\n#SBATCH --requeue\n#SBATCH --open-mode=append\n{loop}\n")
    job, _ = submit(slurm, tiny_runs, "--nodes=1", "--ntasks=2", "--ntasks-per-node=2", script=script)
    wait_until(lambda: len(folders_of(job, tiny_runs)) == 2, "the second run", PATIENCE_S)
    runs = sorted(folders_of(job, tiny_runs), key=newest_step, reverse=True)
    wait_for_step(runs[1], EVERY_STEPS)
    slurm.requeue(job)

    assert slurm.wait_for_end(job, PATIENCE_S) == "COMPLETED", output(job, tiny_runs)
    assert folders_of(job, tiny_runs) == sorted(runs) and [steps_made(run) for run in runs] == [STEPS, STEPS]
    assert output(job, tiny_runs).count("is finished") == 1
