"""Hydra's launcher ``processes``, which runs each job of a sweep in its own process, and the base of all launchers.

A job is an ordinary single run: ``python train.py experiment=decoupled_global seed=1
hydra.run.dir=runs/study/decoupled_global-seed1 …``. (Hydra's own launcher runs all jobs in one process: wandb reuses
the open run, Lightning's DDP re-executes the command line of the sweep, and memory accumulates.)

Imports only Hydra and the standard library.
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
from ipa.overrides import as_typed, quote_value

ALWAYS_NAMED = {"experiment", "seed"}  # so that an extended sweep finds the folders of its earlier jobs
DECIDED = {"hydra.run.dir", "hydra.mode"}  # by the launcher
MAX_NAME_BYTES = 120
KILLED_BY_SIGNAL = 128  # a shell's exit code is this plus the number of the signal

log = logging.getLogger(__name__)


@dataclass
class Job:
    number: int
    name: str
    overrides: Sequence[str]
    folder: Path
    command: list[str]
    log: Path
    exit_code: int | None = None  # None until the job ends; negative for a signal
    unfinished: str = "not started"  # its state while there is no exit code

    def outcome(self) -> str:
        """The outcome in words, with the log file if the job failed."""
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
    """Runs the jobs of one sweep, forwards signals to them, and keeps their outcomes."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = variables
        self.name: str | None = None
        self.jobs: list[Job] = []
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped_by: int | None = None
        self._lock = threading.RLock()  # reentrant: a second signal may interrupt the handler of the first

    @property
    def failed(self) -> bool:
        return any(job.exit_code != 0 for job in self.jobs)

    def run(self, jobs: Sequence[Job], at_a_time: int) -> None:
        """Run all jobs to their end; after a signal, start no further ones."""
        variables = divide_cores(self.variables, at_a_time)
        with self._signals_forwarded(), ThreadPoolExecutor(at_a_time) as threads:
            list(threads.map(lambda job: self._run(job, variables, prefixed=at_a_time > 1), jobs))

    def _run(self, job: Job, variables: Mapping[str, str], prefixed: bool) -> None:
        with self._lock:
            if self.stopped_by is not None:
                return
            log.info("\t#%d %s : %s", job.number, job.name, " ".join(filter_overrides(job.overrides)))
            # in its own session, so that Ctrl-C in a terminal reaches it only once, as the forwarded signal
            process = subprocess.Popen(
                job.command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if prefixed else None,
                stderr=subprocess.STDOUT if prefixed else None,
                start_new_session=True,
            )
            self.running.add(process)
        if process.stdout is not None:
            job.folder.mkdir(parents=True, exist_ok=True)
            relay(process.stdout, f"[{job.name}] ".encode(), job.log)
        job.exit_code = process.wait()
        with self._lock:
            self.running.discard(process)

    @contextmanager
    def _signals_forwarded(self) -> Iterator[None]:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
        handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # ignored by nohup
        before = {number: signal.signal(number, self._forward) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        with self._lock:
            self.stopped_by = number
            for process in self.running:
                process.send_signal(number)

    def report(self) -> None:
        """Log the outcome of every job, if there were any."""
        if not self.jobs:
            return
        done = sum(job.exit_code == 0 for job in self.jobs)
        width = max(len(job.name) for job in self.jobs)
        lines = [f"\t#{job.number} {job.name:{width}}  {job.outcome()}" for job in self.jobs]
        if self.failed and self.name is not None:
            lines.append(f"Run the same command with name={self.name} to continue the jobs that are not done.")
        log.info("%s", "\n".join([f"{done} of {len(self.jobs)} jobs done", *lines]))


def relay(source: IO[bytes], prefix: bytes, copy: Path) -> None:
    """Copy lines to the console with a prefix, and to a file without it."""
    with copy.open("ab", buffering=0) as file:
        for line in source:
            file.write(line)
            sys.stdout.buffer.write(prefix + line.rstrip(b"\n") + b"\n")
            sys.stdout.buffer.flush()


def divide_cores(variables: Mapping[str, str], at_a_time: int) -> Mapping[str, str]:
    """Divide the cores among the jobs; the user's values win. Two of one thread are faster than two of two threads."""
    if at_a_time == 1:
        return variables
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // at_a_time)), "PYTHONUNBUFFERED": "1", **variables}


class SweepLauncher(Launcher):
    """Plans a sweep's jobs: their names, folders and command lines. Subclasses run them."""

    sweep: ClassVar[Sweep]  # outlives the launcher, because sweepers may launch in batches

    def __init__(self) -> None:
        self.config = DictConfig({})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.check()
        self.loader = hydra_context.config_loader
        self.config = config

    def check(self) -> None:
        """Raise UserError for options that cannot be used."""

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs to their end and set their exit codes."""
        raise NotImplementedError

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Always returns COMPLETED, or the sweeper would skip the remaining jobs; the sweep reports failures."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        written = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)["dir"]  # type: ignore[call-overload,index]
        # the last part of the folder if ``name`` selects that; it may have been chosen automatically
        self.sweep.name = Path(self.config.hydra.sweep.dir).name if "${name}" in str(written) else None
        jobs = self.plan(job_overrides, initial_job_idx)
        log.info("Launching %d jobs in %s", len(jobs), self.config.hydra.sweep.dir)
        self.sweep.jobs += jobs
        self.run(jobs)
        if self.sweep.stopped_by is not None:
            self.sweep.report()
            sys.exit(KILLED_BY_SIGNAL + self.sweep.stopped_by)
        return [JobReturn(job.overrides, status=JobStatus.COMPLETED, _return_value=job.exit_code) for job in jobs]

    def plan(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """The jobs with their folders and commands; raises UserError if two jobs share a folder."""
        outer = HydraConfig.instance().cfg
        named = enumerate(zip(self._names(job_overrides, first), job_overrides, strict=True), first)
        try:
            jobs = [self._job(number, name, overrides) for number, (name, overrides) in named]
        finally:
            HydraConfig.instance().cfg = outer
        check_folders([*self.sweep.jobs, *jobs])
        return jobs

    def _names(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[str]:
        """Names from what differs between the jobs; a number where that is too long or not unique."""
        fixed = self._fixed_keys()
        names = [self._name(overrides, fixed) for overrides in job_overrides]
        taken = Counter([*names, *(job.name for job in self.sweep.jobs)])
        return [
            name if name and taken[name] == 1 and len(name.encode()) <= MAX_NAME_BYTES else str(number)
            for number, name in enumerate(names, first)
        ]

    def _name(self, overrides: Sequence[str], fixed: set[str]) -> str:
        """``decoupled_global-seed1``: choices of groups, then values, both in alphabetical order of their keys."""
        values = dict(key_and_value(override) for override in overrides)
        keys = [key for key in sorted(values) if key in ALWAYS_NAMED or key not in fixed]
        choices, others = [], []
        for key in keys:
            word, last = file_name(values[key]), key.rpartition(".")[2]
            if self._is_choice(key):
                choices.append(word)
            else:  # seed1, lr1e-4, precision_bf16
                others.append(f"{last}{word}" if re.match(r"[-+.]?\d", word) else f"{last}_{word}")
        return "-".join([*choices, *others])

    def _fixed_keys(self) -> set[str]:
        """Keys with a single value, the same in all jobs."""
        parsed = OverridesParser.create(self.loader).parse_overrides(as_typed(self.config.hydra.overrides.task))
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
        # without Hydra's options that select a sweep or a folder
        hydra = [each for each in as_typed(self.config.hydra.overrides.hydra) if key_and_value(each)[0] not in DECIDED]
        # ``name`` is the job and ``group`` the sweep, if the command has them and the user did not give them
        place = {"name": subdir, "group": str(self.sweep.name or Path(self.config.hydra.sweep.dir).name)}
        chosen = {key_and_value(override)[0] for override in given}
        place = {key: value for key, value in place.items() if key in config and key not in chosen}
        command = [*this_command(), "hydra.mode=RUN", *hydra, *given, f"hydra.run.dir={quote_value(str(folder))}"]
        command += [f"{key}={quote_value(value)}" for key, value in place.items()]
        return Job(number, subdir, overrides, folder, command, folder / f"{config.hydra.job.name}.log")


class ProcessLauncher(SweepLauncher):
    """``hydra/launcher=processes``: runs jobs on this machine, ``jobs`` of them at a time."""

    __module__ = "hydra_plugins.ipa"  # Hydra only accepts plug-ins of this package; see `register`

    def __init__(self, jobs: int) -> None:
        super().__init__()
        self.at_a_time = jobs

    def check(self) -> None:
        if not isinstance(self.at_a_time, int) or self.at_a_time < 1:
            raise UserError(f"hydra.launcher.jobs={self.at_a_time}: give the number of jobs at a time, 1 or more")

    def run(self, jobs: Sequence[Job]) -> None:
        at_a_time = min(self.at_a_time, len(jobs))
        if at_a_time > 1:  # a single job writes directly to the console and to Hydra's log
            for job in jobs:
                job.log = job.folder / "console.log"
        self.sweep.run(jobs, at_a_time)


def this_script() -> list[str]:
    """The arguments after ``python`` that started this process: a file, or -m and the name of a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.origin != os.path.abspath(sys.argv[0]):
        return [sys.argv[0]]
    return ["-m", spec.name.removesuffix(".__main__")]


def this_command() -> list[str]:
    """This process's command, with only the options that select the configuration."""
    args = get_args_parser().parse_args(sys.argv[1:])
    options = {"--config-name": args.config_name, "--config-path": args.config_path, "--config-dir": args.config_dir}
    return [sys.executable, *this_script(), *(word for pair in options.items() if pair[1] for word in pair)]


def check_folders(jobs: Sequence[Job]) -> None:
    folders = Counter(job.folder for job in jobs)
    if shared := [str(folder) for folder, count in folders.items() if count > 1]:
        raise UserError(
            f"hydra.sweep.subdir gives more than one job the folder {' and '.join(shared)}. "
            "Do not change it, or include ${hydra:job.num}."
        )


def key_and_value(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def file_name(value: str) -> str:
    """The value with ``_`` in place of characters that are inconvenient in the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", value).strip("._")


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Exactly these environment variables inside the context."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def register(variables: Mapping[str, str], *launchers: type[SweepLauncher]) -> Sweep:
    """Register the launchers with Hydra for one command, whose jobs get these variables; returns its (empty) sweep."""
    SweepLauncher.sweep = sweep = Sweep(variables)
    plugins = Plugins.instance()  # searches for installed plug-ins, so it comes before the fake package
    for launcher in launchers:
        plugins.register(launcher)
    # the schema of Hydra's own submitit launcher, if that is installed, would be merged into our YAML of the same name
    ConfigStore.instance().repo.get("hydra", {}).get("launcher", {}).pop("submitit_slurm.yaml", None)
    package = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    package.__dict__["ipa"] = SimpleNamespace(**{launcher.__name__: launcher for launcher in launchers})
    return sweep
