"""Two processes train as one does: DDP and FSDP, with everything that a step can have, resuming from each other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import conftest
import pytest
from conftest import (
    EVERYTHING,
    EXPERIMENTS,
    PAIRS,
    ROOT,
    Command,
    Run,
    World,
    assert_same_run,
    checkpoint,
    column,
    compose,
    rewound,
    rows,
)
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.plugins.environments import SLURMEnvironment
from ranks import together, train_all
from torch import Tensor
from torture import torture

from ipa.errors import UserError
from ipa.training.run import make_trainer
from ipa.training.stopping import Signals, StopOnSignal
from ipa.training.strategies import AdapterDDP, AdapterFSDP, AdapterZeRO2, make_strategy

DDP, FSDP, ZERO2 = (
    (f"trainer={name}", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    for name in ("ddp", "fsdp", "zero2")
)
STRATEGIES = {"ddp": DDP, "fsdp": FSDP, "zero2": ZERO2}
# no previews: test_shared_previews has them; in two processes a sample has another neighbour to be compared with
QUIET = (*conftest.QUIET, "data.batch_size=null")
ACCEPTANCE = (
    *QUIET,
    "global_batch_size=4",
    "optimizer.lr=1e-4",
    "trainer.max_steps=4",
    "trainer.log_every_n_steps=2",
)
ALL = (
    *EVERYTHING,
    *QUIET,
    "global_batch_size=8",
    "trainer.max_steps=3",
    "gradient_checkpointing=true",
)

Jobs = dict[str, Sequence[str]]


def train_together(place: Path, world: World, jobs: Jobs) -> None:
    """All trainings in one start of the processes: name of the folder → overrides, in this order."""
    common = (*world.overrides(), "~logger.wandb")
    together(train_all, [(place / name, (*common, *overrides)) for name, overrides in jobs.items()])


SHARED = [pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero2")]


@pytest.fixture(scope="module", params=["ddp", *SHARED])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, world: World, train_in: Run
) -> Path:
    """Folders of trainings of one process and of two, and of what was begun by one kind and ended by the other."""
    place, strategy = tmp_path_factory.mktemp(request.param), STRATEGIES[request.param]
    spying = ("+callbacks.spy._target_=ranks.Spy", f"+callbacks.spy.path={place}/travelled.json")
    train_in(place / "one", *ACCEPTANCE)
    rewound(train_in(place / "one-all", *ALL), place / "one-two")
    jobs = {
        "two": (*strategy, *ACCEPTANCE, *(spying if strategy is DDP else ())),
        "two-all": (*strategy, *ALL),
        "one-two": (*strategy, *ALL),
    }
    train_together(place, world, jobs)
    train_in(rewound(place / "two-all", place / "two-one"), *ALL)
    return place


def trained(folder: Path) -> dict[str, Tensor]:
    """Weights, their average, and the optimizer's moments of the last checkpoint."""
    saved = checkpoint(folder)
    state = saved["optimizer_states"][0]["state"]
    moments = {f"{name} {number}": value for number, values in state.items() for name, value in values.items()}
    return {**saved["state_dict"], **moments}


def furthest(one: Path, other: Path) -> float:
    """The largest difference of any number of the two; all are plain whole tensors of the same shapes."""
    first, second = trained(one), trained(other)
    assert first.keys() == second.keys()
    assert {type(value) for value in second.values()} == {Tensor}
    assert all(value.shape == second[name].shape for name, value in first.items())
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def test_two_processes_give_what_one_gives(place: Path) -> None:
    """AdamW at 1e-4, float32: within 2e-5 is promised, 6e-8 was measured."""
    assert checkpoint(place / "two")["global_step"] == 4
    assert furthest(place / "one", place / "two") < 2e-6


@pytest.mark.parametrize("name", ["two-one", "one-two"])
def test_a_run_resumes_with_another_number_of_processes(place: Path, name: str) -> None:
    """After two of three steps, with average, clipping, accumulation, schedule and recomputed blocks."""
    assert checkpoint(place / name)["global_step"] == 3
    assert furthest(place / "one-all", place / name) < 1e-5


@pytest.mark.parametrize("name", ["two-one", "one-two"])
def test_the_log_is_that_of_all_processes(place: Path, name: str) -> None:
    """Loss, its buckets and the gradient's norm before clipping; every row once."""
    assert [row["step"] for row in rows(place / name)] == ["1", "2", "3"]
    metrics = [name for name in rows(place / name)[0] if name.startswith(("train/loss", "train/error_t", "train/grad"))]
    assert len(metrics) >= 3
    for metric in metrics:
        one, two = (column(place / folder, metric) for folder in ("one-all", name))
        expected = {step: pytest.approx(float(value), rel=1e-4) for step, value in one.items()}
        assert {step: float(value) for step, value in two.items()} == expected


@pytest.mark.parametrize("place", ["ddp"], indirect=True)
def test_the_throughput_is_that_of_all_processes(place: Path) -> None:
    """Samples per second × seconds per step are the samples of a step, 4 over both."""
    rates, steps = (column(place / "two", f"train/{name}") for name in ("samples_per_s", "step_s"))
    assert [float(rates[step]) * float(steps[step]) for step in rates] == pytest.approx([4, 4], rel=1e-3)


@pytest.mark.parametrize("place", ["ddp"], indirect=True)
def test_only_the_adapters_gradients_travel(place: Path) -> None:
    """Seen by DDP's own hook in a training: the frozen parts are in no bucket, and not sent around at the start."""
    seen = json.loads((place / "travelled.json").read_text())
    assert seen["static"]
    assert sum(seen["bytes"]) == 4 * seen["trained_bytes"] > 0
    assert seen["ignored"] == sorted(seen["frozen"]) and len(seen["frozen"]) > 100
    assert not {*seen["ignored"]} & {*seen["trained"]}


@pytest.mark.slow
def test_all_variants(tmp_path: Path, world: World, train_in: Run) -> None:
    jobs = {
        f"{name}-{experiment}": (*strategy, *ALL, f"experiment={experiment}")
        for name, strategy in STRATEGIES.items()
        for experiment in EXPERIMENTS
    }
    train_together(tmp_path, world, jobs)
    for experiment in EXPERIMENTS:
        train_in(tmp_path / experiment, *ALL, f"experiment={experiment}")
        for name in STRATEGIES:
            assert furthest(tmp_path / experiment, tmp_path / f"{name}-{experiment}") < 1e-5


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0"}
SRUN = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "4"}


def test_every_trainer_names_its_strategy_and_several_processes_get_one_of_its_kind(tmp_path: Path) -> None:
    for name in ("cpu", "gpu", "slurm", *STRATEGIES):
        strategy = compose(tmp_path / "x", f"trainer={name}").trainer.strategy
        assert strategy.kind == (name if name in STRATEGIES else "ddp")
    for kind, expected in {"ddp": AdapterDDP, "fsdp": AdapterFSDP, "zero2": AdapterZeRO2}.items():
        assert make_strategy(kind, "cpu", 1, 1, 60) == "auto"
        assert type(make_strategy(kind, "cpu", 2, 1, 60)) is type(make_strategy(kind, "cpu", 1, 2, 60)) is expected
    with pytest.raises(UserError, match=r"trainer\.strategy\.kind=ddpp: give one of ddp, fsdp, zero2"):
        make_strategy("ddpp", "cpu", 1, 1, 60)
    for devices in ([], [0, -1], ["x"]):
        with pytest.raises(UserError, match=r"^trainer.devices=\["):
            make_strategy("ddp", "cpu", devices, num_nodes=1, timeout_minutes=1)


def test_slurm_says_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning does not requeue: our own signals do."""
    for name, value in {**SRUN, "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    cfg = compose(tmp_path / "x", "trainer=slurm", "trainer.accelerator=cpu").trainer
    environment = instantiate(cfg.strategy).cluster_environment
    assert (cfg.devices, cfg.num_nodes) == (2, 2)
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue


@pytest.mark.parametrize(
    ("started", "told"),
    [
        (TORCHRUN, "torchrun started 2"),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "2"}, "Slurm started 4"),
        (SRUN, "--ntasks-per-node"),
        ({}, "trainer.num_nodes=2, but this process was started by itself"),
    ],
)
def test_a_wrong_number_of_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: dict[str, str], told: str
) -> None:
    """Before a weight is read: each would train for itself in the same folder, or wait for one that never comes."""
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((InstantiationException, ValueError), match=told):
        instantiate(compose(tmp_path / "x", "trainer=cpu", *([] if started else ["trainer.num_nodes=2"])).trainer)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_shell_in_an_allocation_of_several_tasks_starts_its_own_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    for name, value in SRUN.items():
        if name != "SLURM_STEP_NUM_TASKS":
            monkeypatch.setenv(name, value)
    trainer = make_trainer(compose(tmp_path / "x", f"trainer.devices={devices}"), tmp_path, StopOnSignal(Signals(1)))

    assert trainer.world_size == devices
    assert not trainer._accelerator_connector.cluster_environment.creates_processes_externally


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_ways_to_start_processes(start: Command, world: World, tmp_path: Path, strategy: str) -> None:
    """Lightning's own launcher and torchrun; only the first process writes and tells."""
    overrides = (*STRATEGIES[strategy], "data.batch_size=2", "trainer.max_steps=2", "~logger.wandb")
    process = start(*overrides)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    own = tmp_path / "runs/decoupled_global/x"

    place = tmp_path / "torchrun"
    arguments = [*world.overrides(), *overrides, f"hydra.run.dir={place}", "name=x"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run([*command, str(ROOT / "train.py"), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr

    assert furthest(own, place) == 0
    for told in (output, run.stdout + run.stderr):
        assert told.count("step 2 of 2") == told.count("training 5") == 1
    assert list(column(place, "preview/clip_i")) == [2] and (place / "previews/step_000002.png").is_file()
    assert json.loads((place / "summary.json").read_text())["scores"]


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "overrides"), [(4, ()), (10, PAIRS)], ids=["", "pairs"])
def test_kills_at_any_moment_change_nothing(
    kills: int, overrides: tuple[str, ...], world: World, tmp_path: Path
) -> None:
    """Of a rank or within a checkpoint, with data workers: log, adapter and checkpoint are the same bit for bit."""
    assert_same_run(*torture(tmp_path, [*world.overrides(), *overrides], kills))
