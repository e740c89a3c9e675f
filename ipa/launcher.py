"""A sweep's jobs, every one in a process of its own: Hydra's launcher ``processes``, and what all launchers share.

    python train.py -m experiment=decoupled_global seed=1,2 name=study
    python train.py -m experiment=decoupled_global seed=1,2 name=study hydra.launcher.jobs=2     two at a time

A job is a single run like any other, so all that holds for one holds for it: ``python train.py
experiment=decoupled_global seed=1 hydra.run.dir=runs/study/decoupled_global-seed1 …``. The same sweep with the same
name goes on with what is not finished. (In Hydra's own launcher all jobs share one process: wandb reuses the run that
is open, Lightning's DDP executes the sweep's command line once more, and memory piles up.)

Imports only Hydra and the standard library, as `ipa.cli` does.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import IO, ClassVar

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from ipa.errors import UserError

ALWAYS_NAMED = {"experiment", "seed"}  # so that a sweep that grows finds the folders of its earlier jobs
LONGEST_NAME_BYTES = 120
KILLED_BY_SIGNAL = 128  # plus the signal's number, the exit code of a shell

log = logging.getLogger(__name__)


@dataclass
class Job:
    number: int
    name: str
    overrides: Sequence[str]
    folder: Path
    command: list[str]
    log: Path
    exit_code: int | None = None  # of a job that ended; below zero a signal
    unfinished: str = "not started"  # what it is while there is no exit code

    def outcome(self) -> str:
        """In words, and where to look when it went wrong."""
        if self.exit_code is None:
            return self.unfinished
        if self.exit_code == 0:
            return "done"
        if self.exit_code - KILLED_BY_SIGNAL in signal.valid_signals():
            return f"stopped by {signal.Signals(self.exit_code - KILLED_BY_SIGNAL).name}, see {self.log}"
        if self.exit_code > 0:
            return f"failed with exit code {self.exit_code}, see {self.log}"
        return f"ended by {signal.Signals(-self.exit_code).name}, see {self.log}"


class Sweep:
    """Runs the jobs of one sweep, passes signals on to them, and knows how they ended."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.name: str | None = None
        self.jobs: list[Job] = []
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped_by: int | None = None
        self._lock = threading.RLock()  # a second signal may interrupt the handler of the first

    @property
    def failed(self) -> bool:
        return any(job.exit_code != 0 for job in self.jobs)

    def run(self, jobs: Sequence[Job], at_a_time: int) -> None:
        """Returns when all jobs have ended; after a signal no further one is started."""
        environment = shared_fairly(self.environment, at_a_time)
        with self._signals_passed_on(), ThreadPoolExecutor(at_a_time) as threads:
            list(threads.map(lambda job: self._run(job, environment, prefixed=at_a_time > 1), jobs))

    def _run(self, job: Job, environment: Mapping[str, str], prefixed: bool) -> None:
        with self._lock:
            if self.stopped_by is not None:
                return
            log.info("\t#%d %s : %s", job.number, job.name, " ".join(filter_overrides(job.overrides)))
            process = start(job.command, environment, piped=prefixed)
            self.running.add(process)
        if process.stdout is not None:
            job.folder.mkdir(parents=True, exist_ok=True)
            relay(process.stdout, f"[{job.name}] ".encode(), job.log)
        job.exit_code = process.wait()
        with self._lock:
            self.running.discard(process)

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's is not
        before = {number: signal.signal(number, self._pass_on) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        with self._lock:
            self.stopped_by = number
            for process in self.running:
                process.send_signal(number)

    def tell(self) -> None:
        """How every job ended, if there were any."""
        if not self.jobs:
            return
        done = sum(job.exit_code == 0 for job in self.jobs)
        width = max(len(job.name) for job in self.jobs)
        lines = [f"\t#{job.number} {job.name:{width}}  {job.outcome()}" for job in self.jobs]
        if self.failed and self.name is not None:
            lines.append(f"The same command with name={self.name} goes on with those that are not done.")
        log.info("%s", "\n".join([f"{done} of {len(self.jobs)} jobs done", *lines]))


def start(command: list[str], environment: Mapping[str, str], piped: bool) -> subprocess.Popen[bytes]:
    """A process in a session of its own: a terminal's Ctrl-C would reach it beside the signal that is passed on."""
    output = subprocess.PIPE if piped else None
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if piped else None,
        start_new_session=True,
    )


def relay(source: IO[bytes], prefix: bytes, copy: Path) -> None:
    """Bring lines to the console with a prefix, and without it into a file."""
    with copy.open("ab", buffering=0) as file:
        for line in source:
            file.write(line)
            sys.stdout.buffer.write(prefix + line.rstrip(b"\n") + b"\n")
            sys.stdout.buffer.flush()


def shared_fairly(environment: Mapping[str, str], at_a_time: int) -> Mapping[str, str]:
    """Variables for so many processes at a time, below what the user set.

    Two jobs of one thread get more done on two cores than two of two threads, which wait for each other.
    """
    if at_a_time == 1:
        return environment
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // at_a_time)), "PYTHONUNBUFFERED": "1", **environment}


class SweepLauncher(Launcher):
    """Plans a sweep's jobs: their names, folders and command lines. How they are run, a subclass says."""

    sweep: ClassVar[Sweep]  # outlives the launcher, since sweepers may launch in batches

    def __init__(self) -> None:
        self.config = DictConfig({})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.check()
        self.loader = hydra_context.config_loader
        self.config = config

    def check(self) -> None:
        """Raise UserError if the launcher's options cannot be."""

    def run(self, jobs: Sequence[Job]) -> None:
        """Run them to their end, and note each one's exit code."""
        raise NotImplementedError

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """A job that failed is no failure here, or the sweeper would leave the rest undone; the sweep tells it."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        self.sweep.name = OmegaConf.select(self.config, "name")
        jobs = self.plan(job_overrides, initial_job_idx)
        log.info("Launching %d jobs in %s%s", len(jobs), self.config.hydra.sweep.dir, self.manner(len(jobs)))
        self.sweep.jobs += jobs
        self.run(jobs)
        if self.sweep.stopped_by is not None:
            self.sweep.tell()
            sys.exit(KILLED_BY_SIGNAL + self.sweep.stopped_by)
        return [JobReturn(job.overrides, status=JobStatus.COMPLETED, _return_value=job.exit_code) for job in jobs]

    def manner(self, num_jobs: int) -> str:
        """The end of the sentence that announces them."""
        return ""

    def plan(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """The jobs with their folders and commands; raises UserError if two would share a folder."""
        jobs: list[Job] = []
        outer = HydraConfig.instance().cfg
        names = self._names(job_overrides, first)
        try:
            for number, (name, overrides) in enumerate(zip(names, job_overrides, strict=True), first):
                jobs.append(self._job(number, name, overrides))
        finally:
            HydraConfig.instance().cfg = outer
        folders = Counter(job.folder for job in [*self.sweep.jobs, *jobs])
        shared = [str(folder) for folder, count in folders.items() if count > 1]
        if shared:
            raise UserError(
                f"hydra.sweep.subdir gives more than one job the folder {' and '.join(shared)}. "
                "Leave it as it is, or let it contain ${hydra:job.num}."
            )
        return jobs

    def _names(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[str]:
        """From what differs between the jobs; a number where that would be too long, or the same as another's."""
        fixed = self._fixed_keys()
        names = [self._name(overrides, fixed) for overrides in job_overrides]
        taken = Counter([*names, *(job.name for job in self.sweep.jobs)])
        fine = [bool(name) and taken[name] == 1 and len(name.encode()) <= LONGEST_NAME_BYTES for name in names]
        return [
            name if good else str(number) for number, (name, good) in enumerate(zip(names, fine, strict=True), first)
        ]

    def _name(self, overrides: Sequence[str], fixed: set[str]) -> str:
        """``decoupled_global-seed1``: choices of groups first, each kind in alphabetical order, however given."""
        values = dict(key_and_value(override) for override in overrides)
        told = [key for key in sorted(values) if key in ALWAYS_NAMED or key not in fixed]
        choices = [file_name(values[key]) for key in told if self._is_choice(key)]
        return "-".join([*choices, *(named_value(key, values[key]) for key in told if not self._is_choice(key))])

    def _fixed_keys(self) -> set[str]:
        """What the user gave one value for, which is the same in all jobs."""
        given = list(self.config.hydra.overrides.task)
        parsed = OverridesParser.create(self.loader).parse_overrides(given)
        return {override.get_key_element().lstrip("+~") for override in parsed if not override.is_sweep_override()}

    def _is_choice(self, key: str) -> bool:
        return key == "name" or bool(self.loader.get_group_options(key.partition("@")[0]))

    def _job(self, number: int, name: str, overrides: Sequence[str]) -> Job:
        config = self.loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = name, number
        HydraConfig.instance().set_config(config)  # which ${hydra:…} reads
        subdir = str(config.hydra.sweep.subdir)
        folder = Path(self.config.hydra.sweep.dir) / subdir
        given = [override for override in overrides if key_and_value(override)[0] != "name"]
        place = {"hydra.run.dir": str(folder), **self._identity(config, subdir, given)}
        command = [*this_command(), *self._hydra_overrides(), *given]
        command += [f"{key}={quoted(value)}" for key, value in place.items()]
        return Job(number, subdir, overrides, folder, command, folder / f"{config.hydra.job.name}.log")

    def _identity(self, config: DictConfig, subdir: str, given: Sequence[str]) -> dict[str, str]:
        """The job's name and the sweep's, for a command that has such options and a user who did not say otherwise."""
        identity = {"name": subdir, "group": str(self.sweep.name or Path(self.config.hydra.sweep.dir).name)}
        chosen = {key_and_value(override)[0] for override in given}
        return {key: value for key, value in identity.items() if key in config and key not in chosen}

    def _hydra_overrides(self) -> list[str]:
        """Hydra's own options go to the jobs, but for those that make it a sweep or name a folder."""
        given = self.config.hydra.overrides.hydra
        decided = {"hydra.run.dir", "hydra.mode"}
        return ["hydra.mode=RUN", *(override for override in given if key_and_value(override)[0] not in decided)]


class ProcessLauncher(SweepLauncher):
    """What Hydra makes of ``hydra/launcher=processes``: jobs on this machine, so many at a time."""

    __module__ = "hydra_plugins.ipa"  # Hydra refuses plug-ins from elsewhere; see `register`

    def __init__(self, jobs: int) -> None:
        super().__init__()
        self.at_a_time = jobs

    def check(self) -> None:
        if not isinstance(self.at_a_time, int) or self.at_a_time < 1:
            raise UserError(f"hydra.launcher.jobs={self.at_a_time}: give the number of jobs at a time, 1 or more.")

    def manner(self, num_jobs: int) -> str:
        return f", {min(self.at_a_time, num_jobs)} at a time"

    def run(self, jobs: Sequence[Job]) -> None:
        at_a_time = min(self.at_a_time, len(jobs))
        if at_a_time > 1:  # one at a time writes straight to the console, and Hydra's log of it has to do
            for job in jobs:
                job.log = job.folder / "console.log"
        self.sweep.run(jobs, at_a_time)


def this_command() -> list[str]:
    """This process's script with the options that say where the configuration is."""
    spec = sys.modules["__main__"].__spec__
    script = [os.path.abspath(sys.argv[0])] if spec is None else ["-m", spec.name]
    args = get_args_parser().parse_args(sys.argv[1:])
    places = {"--config-name": args.config_name, "--config-path": args.config_path, "--config-dir": args.config_dir}
    return [sys.executable, *script, *(word for pair in places.items() if pair[1] for word in pair)]


def key_and_value(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def quoted(value: str) -> str:
    """As Hydra's grammar reads any text: a folder's name may hold ``=`` or ``,``."""
    return "'" + value.replace("'", r"\'") + "'"


def named_value(key: str, value: str) -> str:
    """``seed1``, ``lr1e-4``, ``precision_bf16``: a word needs something between itself and the key's."""
    last, word = key.rpartition(".")[2], file_name(value)
    return f"{last}{word}" if re.match(r"[-+.]?\d", word) else f"{last}_{word}"


def file_name(value: str) -> str:
    """The value with ``_`` for what is inconvenient in the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", value).strip("._")


def register(environment: Mapping[str, str]) -> Sweep:
    """Make the launchers known to Hydra for one command, whose jobs get these variables; returns what they will run."""
    from ipa.slurm import SlurmLauncher  # which stands on this module

    SweepLauncher.sweep = sweep = Sweep(environment)
    plugins = Plugins.instance()  # looks for plug-ins that are installed, so before the fake package is made
    plugins.register(ProcessLauncher)
    plugins.register(SlurmLauncher)
    # Hydra's own launcher for submitit, where it is installed, would have its schema put over our YAML of that name
    ConfigStore.instance().repo.get("hydra", {}).get("launcher", {}).pop("submitit_slurm.yaml", None)
    package = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    package.__dict__["ipa"] = SimpleNamespace(ProcessLauncher=ProcessLauncher, SlurmLauncher=SlurmLauncher)
    return sweep
