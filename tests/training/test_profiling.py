"""Where the time of a step goes: the log's columns, the table and the trace; and that looking changes nothing."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from conftest import EVERYTHING, FEW, QUIET, Run, column
from safetensors.torch import load_file
from torch.profiler import record_function

from ipa.data.order.streams import TrainStream
from ipa.training import profiling
from ipa.training.profiling import FETCH, MODEL, REST, StepClock, StepProfile, by_part, table


def test_time_belongs_to_the_innermost_action_and_adds_up() -> None:
    clock, earliest = StepClock(), time.perf_counter()
    before, began = clock.read(), time.perf_counter()
    with clock.profile("outer"):
        time.sleep(0.02)
        with clock.profile("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    ended, found, latest = time.perf_counter(), clock.since_reading(before), time.perf_counter()

    assert found["inner"] >= 0.05 and found["outer"] >= 0.04
    assert ended - began <= sum(found.values()) <= latest - earliest


def test_every_action_has_a_part() -> None:
    callback = "[Callback]Checkpoints{'monitor': 'preview/clip_i', 'x': 0.5}.on_train_batch_end"
    seconds = {FETCH: 3.0, f"{MODEL}VAE": 2.0, callback: 1.0, "[Callback]Small.on_fit_start": 1e-3, "": 0.5}
    parts = by_part(seconds)

    assert (parts["data wait"], parts["VAE"], parts[REST]) == (3, 2, 0.5)
    assert parts["callbacks"] == pytest.approx(1.001)
    assert sum(parts.values()) == pytest.approx(sum(seconds.values()))
    assert "| **step** | 3250.50 | 100.0% |" in table(parts, 2)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_wait_for_slow_data_is_in_the_log(
    every: int, train_in: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two batches a step; the first row has no wait for its first batch, in which the workers start."""
    read = TrainStream.__iter__

    def slowly(self: TrainStream) -> Iterator[object]:
        for batch in read(self):
            time.sleep(0.1)
            yield batch

    monkeypatch.setattr(TrainStream, "__iter__", slowly)
    logs = ("trainer.max_steps=6", f"trainer.log_every_n_steps={every}", "trainer.accumulate_grad_batches=2")
    folder = train_in(tmp_path / "slow", *QUIET, *logs)
    waits, steps, rates = (
        {step: float(value) for step, value in column(folder, f"train/{name}").items()}
        for name in ("data_wait_s", "step_s", "samples_per_s")
    )

    assert set(waits) == set(range(every, 7, every))
    del waits[every]
    assert all(0.2 <= wait < steps[step] for step, wait in waits.items())
    assert all(rates[step] * steps[step] == pytest.approx(8, rel=1e-3) for step in steps)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, train_in: Run) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "PLAN", {1: "timed", 4: "traced", 5: "end"})
        return train_in(tmp_path_factory.mktemp("profiled") / "x", *EVERYTHING, *FEW, "profile=true")


def test_profiling_changes_no_number(profiled: Path, variant: Callable[[str], Path]) -> None:
    plain = variant("decoupled_global")
    weights = [load_file(folder / "adapter.safetensors") for folder in (profiled, plain)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert column(profiled, "train/loss") == column(plain, "train/loss")
    assert not (plain / "profile").exists()


def test_the_table_adds_up_and_the_trace_names_the_parts(profiled: Path) -> None:
    folder = profiled / "profile"
    rows = [line.split("|")[1:4] for line in (folder / "table.md").read_text().splitlines() if line.startswith("| ")]
    parts = {name.strip(): float(ms) for name, ms, _ in rows if name.strip() != "part"}
    whole = parts.pop("**step**")
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]

    assert {"data wait", "VAE", "image encoder", "text encoder", "denoiser", "backward", "optimizer"} <= parts.keys()
    assert all(parts[name] > 0 for name in ("VAE", "denoiser", "backward"))
    assert sum(parts.values()) == pytest.approx(whole, abs=0.01 * len(parts))
    assert {"VAE", "image encoder", "text encoder", "image tokens", "denoiser"} <= {each["name"] for each in events}
    assert sorted(path.name for path in folder.iterdir()) == ["table.md", "trace.json.gz"]


class Wrong(L.Callback):
    """Fails after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise KeyError("wrong")


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3], ids=["timed", "traced"])
def test_a_step_that_fails_leaves_nothing_running(
    step: int, train_in: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "PLAN", {1: "timed", 2: "traced", 4: "end"})
    wrong = ("+callbacks.wrong._target_=test_profiling.Wrong", f"+callbacks.wrong.step={step}")
    with pytest.raises(KeyError, match="wrong"):
        train_in(tmp_path / "run", *QUIET, *wrong, "profile=true", "preview.every_n_steps=100")

    assert not torch.autograd._profiler_enabled()
    assert (tmp_path / "run/profile/table.md").exists() == (step == 3)
    assert not (tmp_path / "run/profile/trace.json.gz").exists()


def test_a_run_that_stops_before_its_first_step_has_no_table(tmp_path: Path) -> None:
    clock, model = StepClock(), tiny.make_model()
    trainer = SimpleNamespace(global_step=0, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    with StepProfile(tmp_path / "profile", clock).timing(trainer, model):
        assert clock.device is not None and model.part is not record_function

    assert not (tmp_path / "profile").exists() and clock.device is None and model.part is record_function
