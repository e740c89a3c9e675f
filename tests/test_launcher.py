"""A sweep runs each job in its own process.

The sweeps run as a user runs them, through `ipa.cli.command`, with a task that prints what it sees.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import forked
import hydra
import pytest
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext, RunMode

from ipa.errors import UserError
from ipa.launcher import Job, ProcessLauncher, Sweep, divide_cores
from ipa.overrides import as_typed, quote_value

ROOT = Path(__file__).resolve().parents[1]

JOB = """
import os, signal, sys, time
from ipa.cli import command

@command("train")
def main(cfg):
    seen = dict(pid=os.getpid(), name=cfg.name, group=cfg.group, seed=cfg.seed, run=cfg.paths.run)
    for variable in ("OMP_NUM_THREADS", "HYDRA_FULL_ERROR"):
        seen[variable] = os.environ.get(variable)
    print("job", *(f"{key}={value}" for key, value in seen.items()), flush=True)
    BODY

if __name__ == "__main__":
    main()
"""
END_IN_THREE_WAYS = """
    assert cfg.seed != 2, "seed two is bad"
    if cfg.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""
COUNT_SIGNALS = """
    received = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))
    print("ready", flush=True)
    while not received:
        time.sleep(0.01)
    time.sleep(0.3)
    print("received", *received, flush=True)
    sys.exit(3)
"""


class SweepCommand:
    """``python job.py -m …`` in an empty folder, with a task of this body."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, body: str, *arguments: str) -> subprocess.Popen[str]:
        """In a process of its own, which can be signalled."""
        (self.folder / "job.py").write_text(JOB.replace("BODY", body))
        return subprocess.Popen(
            [sys.executable, "job.py", "-m", *arguments],
            cwd=self.folder,
            env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # a shell's background job ignores Ctrl-C, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def run(self, body: str, *arguments: str) -> tuple[int, str]:
        """Exit code and output."""
        script = self.folder / "job.py"
        script.write_text(JOB.replace("BODY", body))
        result = forked.run(script, "-m", *arguments, cwd=self.folder, environment={})
        return result.returncode, result.stdout + result.stderr

    def files(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.log")}


@pytest.fixture
def sweep(tmp_path: Path) -> SweepCommand:
    (tmp_path / "here").mkdir()
    return SweepCommand(tmp_path / "here")


def jobs_in(output: str) -> list[dict[str, str]]:
    """What the jobs printed."""
    lines = re.findall(r"^(?:\[.*?\] )?job (.*)$", output, re.MULTILINE)
    return [dict(pair.split("=", 1) for pair in line.split()) for line in lines]


def test_each_job_is_a_single_run_in_its_own_process_and_failures_do_not_stop_the_others(sweep: SweepCommand) -> None:
    """Hydra's options reach the jobs of all batches, also folders with characters of Hydra's grammar."""
    options = ("hydra.job.name=other", "hydra.sweep.subdir='${seed}, a=it\\'s'", "group=mine", "hydra.mode=MULTIRUN")
    batches = "hydra.sweeper.max_batch_size=2"
    code, output = sweep.run(END_IN_THREE_WAYS, "seed=1,2,3", "name=study", batches, *options)
    jobs = jobs_in(output)

    assert code == 1, output
    assert len({job["pid"] for job in jobs}) == 3
    assert [(job["seed"], job["group"]) for job in jobs] == [(seed, "mine") for seed in "123"]
    assert sweep.files() == {f"runs/study/{seed}, a=it's/other.log" for seed in (1, 2, 3)}
    assert output.count(f"run={sweep.folder}/runs/study/") == 3
    assert [(job["HYDRA_FULL_ERROR"], job["OMP_NUM_THREADS"]) for job in jobs] == [("None", "None")] * 3
    assert output.count("jobs done") == 1 and "1 of 3 jobs done" in output and "name=study" in output
    assert "1, a=it's  ended by SIGKILL" in output
    assert "failed with exit code 1, see runs/study/2, a=it's/other.log" in output
    log = (sweep.folder / "runs/study/2, a=it's/other.log").read_text()
    assert "Traceback" in log and "seed two is bad" in log


def test_variables_of_the_user_win_and_a_stopped_run_is_reported_by_its_signal() -> None:
    job = Job(0, "a", [], Path("a"), [], Path("a.log"), exit_code=128 + signal.SIGTERM)
    assert job.outcome() == "stopped by SIGTERM, see a.log"
    assert divide_cores({"OMP_NUM_THREADS": "7"}, 2)["OMP_NUM_THREADS"] == "7"
    assert divide_cores({"HOME": "/"}, 1000)["OMP_NUM_THREADS"] == "1"
    assert divide_cores({"HOME": "/"}, 1) == {"HOME": "/"}


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGUSR1))],
)
def test_two_jobs_at_a_time_share_the_cores_and_end_at_a_signal(sweep: SweepCommand, number: signal.Signals) -> None:
    process = sweep.start(COUNT_SIGNALS, "seed=1,2,3", "name=study", "hydra.launcher.jobs=2")
    assert process.stdout is not None
    lines: list[str] = []
    while sum("ready" in line for line in lines) < 2:
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    output = "".join(lines)

    assert process.returncode == 128 + number, rest
    assert re.findall("received (.*)", rest) == [number.name] * 2
    assert "seed2  failed with exit code 3, see runs/study/seed2/console.log" in rest
    assert "seed3  not started" in rest
    for seed in (1, 2):
        assert f"[seed{seed}] job pid=" in output
        assert (sweep.folder / f"runs/study/seed{seed}/console.log").read_text().startswith("job pid=")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {job["OMP_NUM_THREADS"] for job in jobs_in(output)} == {str(threads)}
    for job in jobs_in(output):
        with pytest.raises(ProcessLookupError):
            os.kill(int(job["pid"]), 0)


def test_hydras_own_launcher_on_demand(sweep: SweepCommand) -> None:
    code, output = sweep.run("pass", "seed=1,2", "name=study", "hydra/launcher=basic")

    assert code == 0, output
    assert len({job["pid"] for job in jobs_in(output)}) == 1
    assert [job["run"] for job in jobs_in(output)] == [str(sweep.folder / "runs/study" / str(n)) for n in (0, 1)]


Prepare = Callable[..., tuple[ProcessLauncher, list[list[str]]]]


@pytest.fixture(scope="module")
def prepared() -> Iterator[Prepare]:
    """A launcher, and what its jobs are given, for these arguments."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "-m"])
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("train", ["name=study"], RunMode.MULTIRUN)

        def prepare(*arguments: str, jobs: Any = 1, options: Sequence[str] = ()) -> tuple[ProcessLauncher, Any]:
            config.hydra.overrides.task, config.hydra.overrides.hydra = [*arguments, "name=study"], options
            launcher = ProcessLauncher(jobs=jobs)
            launcher.sweep = Sweep({})  # type: ignore[misc]
            launcher.setup(hydra_context=HydraContext(loader, Callbacks()), task_function=print, config=config)
            overrides = OverridesParser.create(loader).parse_overrides(as_typed(config.hydra.overrides.task))
            (batch,) = BasicSweeper.split_arguments(overrides, None)
            return launcher, batch

        yield prepare


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["seed=1,2", "experiment=decoupled_global"], ["decoupled_global-seed1", "decoupled_global-seed2"]),
        (["seed=range(1,3)", "optimizer.lr=1e-4"], ["seed1", "seed2"]),
        (["optimizer.lr=0.1,0.01", "data.batch_size=8"], ["lr0.1", "lr0.01"]),
        (["trainer.precision=bf16-mixed,32-true"], ["precision_bf16-mixed", "precision32-true"]),
        (["data.train=/a/b,'../c d'"], ["train_a_b", "train_c_d"]),
        (["data.train=[a,b],[c]"], ["train_a_b", "train_c"]),
        (["+trainer.overfit_batches=1,2"], ["overfit_batches1", "overfit_batches2"]),
        (["data.train=/a,a,b"], ["0", "1", "train_b"]),
        ([f"data.train={'a' * 200},b"], ["0", "train_b"]),
        (["optimizer.lr=0.1"], ["0"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_a_job_is_named_after_what_differs(prepared: Prepare, arguments: list[str], expected: list[str]) -> None:
    launcher, batch = prepared(*arguments)
    assert launcher._names(batch, 0) == expected


def test_wrong_options_of_a_sweep_are_refused(prepared: Prepare, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for jobs in (0, "two"):
        with pytest.raises(UserError, match=f"hydra.launcher.jobs={jobs}"):
            prepared("seed=1,2", jobs=jobs)
    given = ("seed=1,2", "data.reference_background=${data.background}")
    launcher, batch = prepared(*given, options=["hydra.sweep.subdir=same"])
    with pytest.raises(UserError, match="more than one job the folder runs/study/same"):
        launcher.plan(batch, 0)


@pytest.mark.parametrize("value", ["a=b,c", "it's", 'say "x"', "back\\slash", "end\\", 'a\\\\"b"', "", "${x}"])
def test_a_quoted_value_is_read_as_it_was(value: str) -> None:
    assert OverridesParser.create().parse_override(f"key={quote_value(value)}").value() == value
