"""A sweep's jobs on a cluster: Hydra's launcher ``submitit_slurm``.

    python train.py -m experiment=decoupled_global,simple_global name=study hydra/launcher=submitit_slurm \\
        hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=1

The jobs are those of `ipa.launcher`, with the same names, folders and command lines, so what was begun here may be gone
on with there. Each is one task of a Slurm array, which submitit submits; it runs its command line in a process of its
own, once for every task of the job, and passes nothing but that command line on. Signals reach the run itself, which
writes its checkpoint and requeues the job.

(The launcher that Hydra has for submitit pickles the configuration and all of Hydra's state instead, runs jobs
in a process that has signal handlers of its own, names their folders after Slurm's numbers, so that no second sweep
goes on with them, and gives up at the first job that fails. Its options are the same.)

Imports only Hydra and the standard library; submitit when there is something to submit.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf

from ipa.errors import UserError
from ipa.launcher import KILLED_BY_SIGNAL, Job, SweepLauncher

OF_ALL_EXECUTORS = {"nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min", "name"}
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT") if hasattr(signal, name)]
POLL_S = 1.0
ASK_SLURM_S = 10.0
# Preempted with a grace time: Slurm tells the tasks, and would take a job that obeys for a failed one. The script of a
# job that is cancelled is ended before it comes to these lines.
AFTERWARDS = ["code=$?", 'if [ "$code" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi', 'exit "$code"']
LOST = 1  # exit code of a job that ended without telling one

log = logging.getLogger(__name__)


class SlurmLauncher(SweepLauncher):
    """What Hydra makes of ``hydra/launcher=submitit_slurm``; the options are explained in its YAML."""

    __module__ = "hydra_plugins.ipa"  # Hydra refuses plug-ins from elsewhere; see `ipa.launcher.register`

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
                f"hydra/launcher=submitit_slurm: this machine has no {' and no '.join(absent)}. Start the sweep where "
                "Slurm is, or here with hydra/launcher=processes"
            )

    def run(self, jobs: Sequence[Job]) -> None:
        """Submit them and wait; a sweep that is interrupted meanwhile leaves its jobs to Slurm."""
        submitted = self.submit([job.command for job in jobs])
        for job, one in zip(jobs, submitted, strict=True):
            job.unfinished = f"left to Slurm as its job {one.job_id}"
            log.info("\t#%d %s : Slurm's job %s, %s", job.number, job.name, one.job_id, one.paths.stdout)
        log.info("Ctrl-C ends the waiting; the jobs, scancel %s", submitted[0].job_id.partition("_")[0])
        try:
            wait_for(jobs, submitted)
        except KeyboardInterrupt:
            self.sweep.stopped_by = signal.SIGINT

    def submit(self, commands: list[list[str]]) -> list[Any]:
        """submitit's jobs; raises UserError with what sbatch has against them."""
        from submitit import AutoExecutor
        from submitit.core.utils import FailedJobError

        executor = AutoExecutor(self.folder, cluster="slurm")
        executor.update_parameters(**submitit_options(self.options))
        try:
            with environment(self.sweep.environment):  # which sbatch hands on to the jobs
                return executor.map_array(run_command, commands)
        except FailedJobError as error:
            told = [line for line in str(error).splitlines() if line.startswith("sbatch: ")] or [str(error)]
            raise UserError("\n".join([*told, "The options are hydra.launcher.…, see docs/cluster.md."])) from error


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Just these variables, for what is started inside."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def submitit_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """As submitit's executor takes them, those that are null left to Slurm."""
    given: dict[str, Any] = {name: plain(value) for name, value in options.items() if value is not None}
    # submitit's own signal, USR2, would have the process end at once
    others = {"signal": f"USR1@{given['signal_delay_s']}", **given["additional_parameters"]}
    given["additional_parameters"] = {name: value for name, value in others.items() if value is not False}
    if others.get("requeue"):
        given["teardown"] = AFTERWARDS
    return {
        "stderr_to_stdout": True,
        **{name if name in OF_ALL_EXECUTORS else f"slurm_{name}": value for name, value in given.items()},
    }


def plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def run_command(command: list[str]) -> int:
    """One task of a job, called by submitit; returns the exit code, which is this process's own as well.

    Slurm sends signals to all processes of a task, so they need not be passed on. A run that one of them ended may be
    requeued, and then this has no result yet.
    """
    heard: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: heard.append(number))
    code = subprocess.call(command, stdin=subprocess.DEVNULL)
    if code < 0:
        code = KILLED_BY_SIGNAL - code
    if code and set(heard) - {signal.SIGCONT}:
        sys.exit(code)
    if code:  # submitit would let Slurm take it for a success
        atexit.register(os._exit, code)
    return code


def wait_for(jobs: Sequence[Job], submitted: Sequence[Any]) -> None:
    """Until every job has a result, or has none and is unknown to Slurm; one that was requeued is known."""
    waiting = list(zip(jobs, submitted, strict=True))
    asked = time.monotonic()
    while waiting:
        known = None
        if time.monotonic() - asked > ASK_SLURM_S:
            known, asked = known_to_slurm([one.job_id for _, one in waiting]), time.monotonic()
        for job, one in waiting:
            if has_result(one):
                job.exit_code = max(result(one.task(task)) for task in range(one.num_tasks))
            elif known is not None and one.job_id not in known:
                job.exit_code, job.log = LOST, one.paths.stdout
        waiting = [(job, one) for job, one in waiting if job.exit_code is None]
        time.sleep(POLL_S)


def has_result(job: Any) -> bool:
    """Of all its tasks; submitit would ask Slurm's accounting, which not every cluster has."""
    return all(job.task(task).paths.result_pickle.exists() for task in range(job.num_tasks))


def result(task: Any) -> int:
    """The exit code of a task's command; an error of submitit's own is told, and is a failure."""
    error = task.exception()
    if error is not None:
        log.error("%s", error)
        return LOST
    return int(task.result())


def known_to_slurm(names: Sequence[str]) -> set[str] | None:
    """Which of these jobs wait, run, or will run again; None if Slurm does not answer."""
    ids = ",".join({name.partition("_")[0] for name in names})
    command = ["squeue", "--array", "--noheader", "--format=%i", f"--jobs={ids}"]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode and "Invalid job id" not in told.stderr:
        log.warning("squeue: %s; asked again in %g s", told.stderr.strip(), ASK_SLURM_S)
        return None
    return set(told.stdout.split())
