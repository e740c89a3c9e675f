"""Hydra's launcher ``submitit_slurm``, which runs each job of a sweep as a Slurm job.

The jobs have the same names, folders and command lines as in `ipa.launcher`. submitit submits them as one Slurm array.
Each task of a job runs the job's command line in its own process. Signals reach the run itself, which writes a
checkpoint and requeues the job.

(Hydra's own submitit launcher, whose options are the same, replaces the signal handlers of the jobs, names folders
after Slurm's job numbers, so that a second sweep cannot continue them, and stops at the first job that fails.)

Imports only Hydra and the standard library; imports submitit to submit.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from ipa.errors import UserError
from ipa.launcher import KILLED_BY_SIGNAL, Job, SweepLauncher, environment

OF_ALL_EXECUTORS = {"nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min", "name"}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
POLL_S = 1.0
ASK_SLURM_S = 10.0
# After preemption with a grace time, Slurm counts a job that stops in time as failed. In a cancelled job, the script
# ends before these lines.
REQUEUE_IF_PREEMPTED = ["code=$?", 'if [ "$code" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi', 'exit "$code"']
LOST = 1  # exit code of a job that ended without one

log = logging.getLogger(__name__)


class SlurmLauncher(SweepLauncher):
    """``hydra/launcher=submitit_slurm``; its YAML explains the options."""

    __module__ = "hydra_plugins.ipa"  # Hydra only accepts plug-ins of this package; see `ipa.launcher.register`

    def __init__(self, submitit_folder: str, **options: Any) -> None:
        super().__init__()
        self.folder = submitit_folder
        self.options = options

    def check(self) -> None:
        try:
            import submitit  # noqa: F401
        except ImportError as error:
            raise UserError("hydra/launcher=submitit_slurm needs submitit: pip install -e '.[slurm]'") from error
        if absent := [program for program in ("sbatch", "srun", "squeue") if shutil.which(program) is None]:
            raise UserError(
                f"hydra/launcher=submitit_slurm: this machine has no {' and no '.join(absent)}. Start the sweep on a "
                "machine with Slurm, or here with hydra/launcher=processes"
            )

    def run(self, jobs: Sequence[Job]) -> None:
        """Submit the jobs and wait; when interrupted, the sweep leaves its jobs in Slurm."""
        submitted = self.submit([job.command for job in jobs])
        for job, one in zip(jobs, submitted, strict=True):
            job.unfinished = f"left in Slurm as job {one.job_id}"
            log.info("\t#%d %s : Slurm's job %s, %s", job.number, job.name, one.job_id, one.paths.stdout)
        log.info("Ctrl-C stops waiting; to stop the jobs: scancel %s", submitted[0].job_id.partition("_")[0])
        try:
            wait_for(jobs, submitted)
        except KeyboardInterrupt:
            self.sweep.stopped_by = signal.SIGINT

    def submit(self, commands: list[list[str]]) -> list[Any]:
        """Submit with submitit; raises UserError with the message of sbatch."""
        from submitit import AutoExecutor
        from submitit.core.utils import FailedJobError

        executor = AutoExecutor(self.folder, cluster="slurm")
        executor.update_parameters(**submitit_options(self.options))
        try:
            with environment(self.sweep.variables):  # sbatch passes them to the jobs
                return executor.map_array(run_command, commands)
        except FailedJobError as error:
            messages = [line for line in str(error).splitlines() if line.startswith("sbatch: ")] or [str(error)]
            raise UserError("\n".join([*messages, "Set hydra.launcher.…, see docs/cluster.md."])) from error


def submitit_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the names that submitit's executor takes; options that are null are left to Slurm."""
    given: Any = OmegaConf.to_container(OmegaConf.create(dict(options)), resolve=True)
    given = {name: value for name, value in given.items() if value is not None}
    # submitit's own signal, USR2, would end the process at once
    others = {"signal": f"USR1@{given['signal_delay_s']}", **given["additional_parameters"]}
    given["additional_parameters"] = {name: value for name, value in others.items() if value is not False}
    if others.get("requeue"):
        given["teardown"] = REQUEUE_IF_PREEMPTED
    return {
        "stderr_to_stdout": True,
        **{name if name in OF_ALL_EXECUTORS else f"slurm_{name}": value for name, value in given.items()},
    }


def run_command(command: list[str]) -> int:
    """Run one task of a job (called by submitit); the exit code is also this process's own.

    Slurm sends signals to all processes of a task, so they are not forwarded. A run that was ended by a signal may be
    requeued; it has no result yet.
    """
    received: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: received.append(number))
    code = subprocess.call(command, stdin=subprocess.DEVNULL)
    if code < 0:
        code = KILLED_BY_SIGNAL - code
    if code and set(received) - {signal.SIGCONT}:
        sys.exit(code)
    if code:  # or submitit would let Slurm count it as a success
        atexit.register(os._exit, code)
    return code


def wait_for(jobs: Sequence[Job], submitted: Sequence[Any]) -> None:
    """Wait until every job has a result or is unknown to Slurm, which knows requeued jobs."""
    waiting = list(zip(jobs, submitted, strict=True))
    asked = time.monotonic()
    while waiting:
        known = None
        if time.monotonic() - asked > ASK_SLURM_S:
            known, asked = known_to_slurm([one.job_id for _, one in waiting]), time.monotonic()
        for job, one in waiting:
            # submitit would ask Slurm's accounting, which some clusters lack
            if all(one.task(task).paths.result_pickle.exists() for task in range(one.num_tasks)):
                job.exit_code = max(result(one.task(task)) for task in range(one.num_tasks))
            elif known is not None and one.job_id not in known:
                job.exit_code, job.log = LOST, one.paths.stdout
        waiting = [(job, one) for job, one in waiting if job.exit_code is None]
        time.sleep(POLL_S)


def result(task: Any) -> int:
    """The exit code of a task's command; an error in submitit itself is logged and counts as a failure."""
    error = task.exception()
    if error is not None:
        log.error("%s", error)
        return LOST
    return int(task.result())


def known_to_slurm(names: Sequence[str]) -> set[str] | None:
    """Which of these jobs wait, run, or will run again; None if squeue fails."""
    ids = ",".join({name.partition("_")[0] for name in names})
    command = ["squeue", "--array", "--noheader", "--format=%i", f"--jobs={ids}"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode and "Invalid job id" not in listed.stderr:
        log.warning("squeue: %s; next attempt in %g s", listed.stderr.strip(), ASK_SLURM_S)
        return None
    return set(listed.stdout.split())
