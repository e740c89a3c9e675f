"""Signals: a checkpoint, then the end with the code of the signal, at whatever moment it comes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from bystanders import fetches, signal_at, train_of_ranks
from conftest import FEW, QUIET, Command, Run, World, assert_same_run, checkpoint, column
from lightning import Trainer
from ranks import WORLD, together

from ipa.data import workers
from ipa.training.checkpointing import checkpoints_in
from ipa.training.stopping import Signals, Stopped, replace_handlers, requeue

FOUR = ("trainer.max_steps=4", "image_prompt_check.every_n_steps=3", "+data.window=4", *FEW)
LIMIT_S = 60


@pytest.fixture(autouse=True)
def _hears_ctrl_c() -> Iterator[None]:
    """A background job, as the tests may be one, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, train_in: Run) -> Path:
    """Four steps without a stop."""
    return train_in(tmp_path_factory.mktemp("runs") / "whole", *FOUR)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("moment", "step", "saved", "number"),
    [
        pytest.param("setup", 0, None, signal.SIGTERM, marks=slow),  # nothing is there to be saved
        pytest.param("start", 0, 0, signal.SIGTERM, marks=slow),
        pytest.param("data", 0, 0, signal.SIGTERM, marks=slow),
        ("step", 1, 1, signal.SIGINT),
        pytest.param("step", 2, 2, signal.SIGTERM, marks=slow),  # where a checkpoint and a preview are due
        ("preview", 2, 2, signal.SIGTERM),
        ("data", 2, 2, signal.SIGUSR1),
        ("step", 4, 4, signal.SIGTERM),
        pytest.param("preview", 4, 4, signal.SIGTERM, marks=slow),
        pytest.param("end", 4, 4, signal.SIGTERM, marks=slow),
    ],
)
def test_a_run_stops_with_a_checkpoint_and_resumes(
    train_in: Run, tmp_path: Path, whole: Path, moment: str, step: int, saved: int | None, number: signal.Signals
) -> None:
    folder, overrides = tmp_path / "x", (*FOUR, *signal_at(moment, step, number, tmp_path / "flag"))
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    with pytest.raises(Stopped) as end:
        train_in(folder, *overrides)

    assert end.value.code == 128 + number
    if saved is None:
        assert not checkpoints_in(folder / "checkpoints")
    else:
        assert checkpoint(folder)["global_step"] == saved
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    assert not (folder / "summary.json").exists()

    train_in(folder, *overrides)

    assert_same_run(folder, whole)
    assert (folder / "previews/step_000002.png").read_bytes() == (whole / "previews/step_000002.png").read_bytes()


@pytest.mark.parametrize("resumes", [False, pytest.param(True, marks=slow)])
def test_with_accumulation_it_stops_after_a_whole_step(train_in: Run, tmp_path: Path, resumes: bool) -> None:
    accumulate = (*QUIET, "trainer.accumulate_grad_batches=2", "trainer.max_steps=3")
    overrides = (*accumulate, *signal_at("step", 2, signal.SIGTERM, tmp_path / "flag"))

    with pytest.raises(Stopped):
        train_in(tmp_path / "x", *overrides)
    assert checkpoint(tmp_path / "x")["global_step"] == 2
    if resumes:
        assert_same_run(train_in(tmp_path / "x", *overrides), train_in(tmp_path / "whole", *accumulate))


@pytest.mark.slow
def test_several_ranks_stop_for_a_signal_that_one_hears_in_its_last_step(world: World, tmp_path: Path) -> None:
    """No further step is there to agree in, and pictures to be made and scored that the others would wait for."""
    ranks = ("trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={WORLD}", "trainer.precision=32-true")
    common = [*world.overrides(), "~logger.wandb", *ranks, *QUIET, "trainer.max_steps=3"]
    hears = signal_at("step", 3, signal.SIGTERM, tmp_path / "flag")

    together(train_of_ranks, [tmp_path / "x"] * WORLD, [common, [*common, *hears]])

    assert [(tmp_path / f"end_{rank}").read_text() for rank in range(WORLD)] == ["Stopped: 143"] * WORLD
    assert checkpoint(tmp_path / "x")["global_step"] == 3


def test_no_step_waits_for_the_device_but_those_that_are_logged(train_in: Run, tmp_path: Path) -> None:
    steps = ("trainer.max_steps=6", "trainer.log_every_n_steps=3", "preview.every_n_steps=0", "data.num_workers=1")

    train_in(tmp_path / "x", *QUIET, *steps, *fetches(tmp_path / "n"))

    fetched = [int(line) for line in (tmp_path / "n").read_text().splitlines()]
    assert [number > 0 for number in fetched] == [False, False, True] * 2


def test_a_data_worker_outlives_the_grace_of_its_process() -> None:
    heard = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in heard}
    try:
        workers.begin(0, grace_s=1000)
        for number in heard:
            signal.raise_signal(number)
        left_s, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert left_s > 1000


def wait_busily(grace_s: float, ready: Any) -> None:
    with Signals(grace_s=grace_s).listening() as signals:
        signals.interruptible = False
        ready.set()
        time.sleep(LIMIT_S)


@pytest.mark.parametrize(
    ("grace_s", "numbers"),
    [(0.2, [signal.SIGTERM]), (600, [signal.SIGINT, signal.SIGINT])],
    ids=["a step that does not end is left after the grace", "a second Ctrl-C ends the process at once"],
)
def test_a_process_that_cannot_end_its_step(grace_s: float, numbers: list[signal.Signals]) -> None:
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=wait_busily, args=(grace_s, ready := fork.Event()))
    process.start()
    assert ready.wait(LIMIT_S)
    for number in numbers:
        os.kill(process.pid or 0, number)
        time.sleep(0.3)
    process.join(LIMIT_S)
    assert process.exitcode == 128 + numbers[0]


def test_lightning_has_what_is_silenced_and_ignored_signals_stay_so() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert callable(trainer._signal_connector.register_signal_handlers)
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    before = signal.getsignal(signal.SIGTERM)
    replace_handlers(trainer, lambda: None)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before

    own = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Signals(1).listening():
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, own)


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
        ({"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "bash"}, None),
        ({}, None),
    ],
)
def test_slurm_is_asked_to_start_the_job_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, environment: dict[str, str], job: str | None
) -> None:
    program, record = tmp_path / "scontrol", tmp_path / "asked"
    monkeypatch.setenv("PATH", str(tmp_path))
    for code in (0, 1):
        program.write_text(f'#!/bin/sh\necho "$@" >{record}\necho "no such job" >&2\nexit {code}\n')
        program.chmod(0o755)
        requeue(environment)
        assert (f"job {job} was not requeued: no such job" in caplog.text) == bool(job and code)
    assert record.exists() == bool(job) and (job is None or record.read_text() == f"requeue {job}\n")


def wait_for_steps(process: subprocess.Popen[str], folder: Path) -> None:
    until = time.monotonic() + LIMIT_S
    while len(checkpoints_in(folder / "checkpoints")) < 2:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def with_all_children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """As a scheduler or a terminal sends it: data workers and ranks get it, too."""
    first = psutil.Process(process.pid)
    return [first, *first.children(recursive=True)]


LONG = ("trainer.max_steps=3000", "checkpoint.every_n_steps=10", "preview.every_n_steps=0", "scoring=null")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("whom", ["all", "first", "last"])
def test_real_processes_stop_in_time(start: Command, tmp_path: Path, ranks: int, whom: str) -> None:
    """Lightning starts the second rank; whichever hears, all stop after the same step."""
    options = (*LONG, "~logger.wandb", f"trainer.devices={ranks}", "data.num_workers=2")
    process, folder = start(*options), tmp_path / "runs/decoupled_global/x"
    wait_for_steps(process, folder)
    processes = with_all_children(process)
    heard = {"all": processes, "first": processes[:1], "last": last_rank(processes)}[whom]

    began = time.monotonic()
    for each in heard:
        each.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT_S)

    assert time.monotonic() - began < 30
    assert process.returncode == 128 + signal.SIGTERM, output
    step = checkpoint(folder)["global_step"]
    assert f"SIGTERM: stopped after step {step} of 3000; the same command resumes" in output
    assert list(column(folder, "train/loss")) == list(range(1, step + 1))
    assert psutil.wait_procs(processes[1:], timeout=10)[1] == []  # none is left behind

    process = start(*options, f"trainer.max_steps={step + 3}")
    output, _ = process.communicate(timeout=2 * LIMIT_S)
    assert process.returncode == 0, output
    assert list(column(folder, "train/loss")) == list(range(1, step + 4))


def last_rank(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The second of two ranks, or the only one; its data workers come after it."""
    return [each for each in processes if each.environ().get("LOCAL_RANK") == "1"][:1] or processes[:1]


@pytest.mark.slow
def test_a_signal_to_all_ends_wandbs_service_and_the_run_stops_as_ever(start: Command, tmp_path: Path) -> None:
    """As Slurm sends it to all processes of a job; the service is gone before the last values are logged."""
    process, folder = start(*LONG, WANDB_MODE="offline"), tmp_path / "runs/decoupled_global/x"
    wait_for_steps(process, folder)
    processes = with_all_children(process)
    services = [each for each in processes if "wandb" in each.name()]
    assert services

    for each in [*services, *processes]:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT_S)

    assert process.returncode == 128 + signal.SIGTERM, output
    step = checkpoint(folder)["global_step"]
    assert f"SIGTERM: stopped after step {step} of 3000" in output
    assert list(column(folder, "train/loss")) == list(range(1, step + 1))
