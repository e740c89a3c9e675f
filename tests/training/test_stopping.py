"""Signals: a checkpoint, then the end with the code of the signal, at whatever moment it comes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from bystanders import fetches, signal_at, train_of_ranks
from conftest import Command, Run, World, checkpoint, column
from lightning import Trainer
from ranks import WORLD, together
from test_resume import assert_same_run

from ipa.data import workers
from ipa.training.checkpointing import checkpoints_in
from ipa.training.stopping import Signals, Stopped, replace_handlers, requeue

TWELVE = ("trainer.max_steps=12", "preview.every_n_steps=4", "image_prompt_check.every_n_steps=3", "scoring=null")
PATIENCE_S = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, train_in: Run) -> Path:
    """Twelve steps, two passes over the data, which nobody stopped."""
    return train_in(tmp_path_factory.mktemp("runs") / "whole", *TWELVE)


@pytest.mark.parametrize(
    ("moment", "step", "saved"),
    [
        ("setup", 0, None),  # nothing is there to be saved, and nothing is lost
        ("start", 0, 0),
        ("data", 0, 0),
        ("step", 3, 3),
        ("preview", 4, 4),
        ("data", 5, 5),
        ("step", 8, 8),  # where a checkpoint and a preview are due
        ("step", 12, 12),
        ("preview", 12, 12),
        ("end", 12, 12),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_stops_with_a_checkpoint_and_goes_on(
    train_in: Run, tmp_path: Path, whole: Path, moment: str, step: int, saved: int | None, number: signal.Signals
) -> None:
    if number != signal.SIGTERM and (moment, step) not in (("step", 3), ("data", 5)):
        pytest.skip("one signal is enough there")
    folder, overrides = tmp_path / "x", (*TWELVE, *signal_at(moment, step, number, tmp_path / "flag"))
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
    assert (folder / "previews/step_000004.png").read_bytes() == (whole / "previews/step_000004.png").read_bytes()


def test_with_accumulation_it_stops_after_a_whole_step(train_in: Run, tmp_path: Path) -> None:
    accumulate = (*TWELVE, "trainer.accumulate_grad_batches=2", "trainer.max_steps=5")
    whole = train_in(tmp_path / "whole", *accumulate)
    overrides = (*accumulate, *signal_at("step", 3, signal.SIGTERM, tmp_path / "flag"))

    with pytest.raises(Stopped):
        train_in(tmp_path / "x", *overrides)
    assert checkpoint(tmp_path / "x")["global_step"] == 3
    train_in(tmp_path / "x", *overrides)

    assert_same_run(tmp_path / "x", whole)


@pytest.mark.slow
def test_several_ranks_stop_for_a_signal_that_one_hears_in_its_last_step(world: World, tmp_path: Path) -> None:
    """No further step is there to agree in, and pictures to be made and scored that the others would wait for."""
    ranks = ("trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={WORLD}", "trainer.precision=32-true")
    quiet = ("data.val=null", "scoring=null", "image_prompt_check.every_n_steps=0", "trainer.max_steps=3")
    common = [*world.overrides(), "~logger.wandb", *ranks, *quiet]
    hears = signal_at("step", 3, signal.SIGTERM, tmp_path / "flag")

    together(train_of_ranks, [tmp_path / "x"] * WORLD, [common, [*common, *hears]])

    assert [(tmp_path / f"end_{rank}").read_text() for rank in range(WORLD)] == ["Stopped: 143"] * WORLD
    assert checkpoint(tmp_path / "x")["global_step"] == 3


def test_no_step_waits_for_the_device_but_those_that_are_logged(train_in: Run, tmp_path: Path) -> None:
    quiet = ("image_prompt_check.every_n_steps=0", "preview.every_n_steps=0", "scoring=null", "data.num_workers=1")

    train_in(tmp_path / "x", "trainer.max_steps=8", "trainer.log_every_n_steps=4", *quiet, *fetches(tmp_path / "n"))

    fetched = [int(line) for line in (tmp_path / "n").read_text().splitlines()]
    assert [number > 0 for number in fetched] == [False, False, False, True] * 2


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


def run_alone(script: str, *numbers: int, pause_s: float = 0.3) -> int:
    """The exit code of a process that gets these signals when it says that it is ready."""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    for number in numbers:
        process.send_signal(number)
        time.sleep(pause_s)
    return process.wait(PATIENCE_S)


BUSY = """
import signal, time
from ipa.training.stopping import Signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job, as the tests may be one, ignores it
with Signals(grace_s={grace_s}).listening() as signals:
    signals.obey = False
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_step_that_does_not_end_is_left_after_the_grace() -> None:
    assert run_alone(BUSY.format(grace_s=0.2), signal.SIGTERM) == 128 + signal.SIGTERM


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    assert run_alone(BUSY.format(grace_s=600), signal.SIGINT, signal.SIGINT) == 128 + signal.SIGINT


def test_signals_that_are_ignored_stay_so() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Signals(1).listening():
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_lightning_has_what_is_silenced() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for owner, name in [
        (trainer._signal_connector, "register_signal_handlers"),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
    ]:
        assert callable(getattr(owner, name))
    before = signal.getsignal(signal.SIGTERM)

    replace_handlers(trainer, lambda: None)
    trainer._signal_connector.register_signal_handlers()

    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({"SLURM_JOB_ID": "12"}, ["requeue", "12"]),
        ({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, ["requeue", "12_3"]),
        ({"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "bash"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("code", [0, 1])
def test_slurm_is_asked_to_start_the_job_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, environment, asked: Sequence[str] | None, code: int
) -> None:
    program, record = tmp_path / "scontrol", tmp_path / "asked"
    program.write_text(f'#!/bin/sh\necho "$@" >{record}\necho "no such job" >&2\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    requeue(environment)

    assert (record.read_text().split() if record.exists() else None) == asked
    if asked is not None and code:
        assert f"job {asked[1]} was not requeued: no such job" in caplog.text


def wait_for_steps(process: subprocess.Popen[str], folder: Path) -> None:
    until = time.monotonic() + PATIENCE_S
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
    output, _ = process.communicate(timeout=PATIENCE_S)

    assert time.monotonic() - began < 30
    assert process.returncode == 128 + signal.SIGTERM, output
    step = checkpoint(folder)["global_step"]
    assert f"SIGTERM: stopped after step {step} of 3000; the same command goes on" in output
    assert list(column(folder, "train/loss")) == list(range(1, step + 1))
    assert psutil.wait_procs(processes[1:], timeout=10)[1] == []  # none is left behind

    process = start(*options, f"trainer.max_steps={step + 3}")
    output, _ = process.communicate(timeout=2 * PATIENCE_S)
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
    output, _ = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 128 + signal.SIGTERM, output
    step = checkpoint(folder)["global_step"]
    assert f"SIGTERM: stopped after step {step} of 3000" in output
    assert list(column(folder, "train/loss")) == list(range(1, step + 1))
