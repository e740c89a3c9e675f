"""Kill -9 at any moment, with data workers: the samples and the losses are those of a run in one go."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import World, run_training

KILLS = 20
STEPS = 400


def run_alone(folder: Path, overrides: list[str]) -> None:
    """In a process of its own, which leads its data workers: they can be killed together."""
    os.setsid()
    torch.set_num_threads(1)
    run_training(folder, *overrides)


def start(folder: Path, overrides: list[str]) -> BaseProcess:
    """From a server that has imported everything: a run starts in a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=run_alone, args=(folder, overrides))
    process.start()
    return process


def ledger(file: Path) -> dict[int, list[tuple[list[str], str]]]:
    """Step → what every attempt at it saw and reached; the line that a kill cut off is left out."""
    attempts: dict[int, list[tuple[list[str], str]]] = {}
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("}\n"):
            entry = json.loads(line)
            attempts.setdefault(entry["step"], []).append((entry["keys"], entry["loss"]))
    return attempts


@pytest.mark.slow
def test_twenty_kills_change_nothing(world: World, tmp_path: Path) -> None:
    """Keys and losses are compared bit for bit, also of the steps that were made several times."""

    def overrides(file: Path) -> list[str]:
        ledger_callback = ["+callbacks.ledger._target_=bystanders.Ledger", f"+callbacks.ledger.file={file}"]
        few = ["preview.num_prompts=1", "preview.num_scored=1", "preview.every_n_steps=100", "scoring=null"]
        often = [f"trainer.max_steps={STEPS}", "checkpoint.every_n_steps=7", "data.num_workers=2"]
        lanes = ["data.lanes.ranks=1", "data.lanes.workers=2", "+data.window=5", "~logger.wandb"]
        return [*world.overrides(), *few, *often, *lanes, *ledger_callback]

    whole = start(tmp_path / "whole", overrides(tmp_path / "whole.jsonl"))
    whole.join()
    assert whole.exitcode == 0
    draw, folder, file = random.Random(), tmp_path / "killed", tmp_path / "killed.jsonl"
    kills = 0
    while kills < KILLS:
        process = start(folder, overrides(file))
        lines = file.read_text().count("\n") if file.exists() else 0
        while process.is_alive() and not (file.exists() and file.read_text().count("\n") > lines):
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.0))
        if not process.is_alive():
            break  # it came to its end
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        kills += 1
    last = start(folder, overrides(file))
    last.join()

    assert last.exitcode == 0
    assert kills == KILLS
    expected, seen = ledger(tmp_path / "whole.jsonl"), ledger(file)
    assert sorted(seen) == sorted(expected) == list(range(1, STEPS + 1))
    assert {step: {str(attempt) for attempt in attempts} for step, attempts in seen.items()} == {
        step: {str(attempts[0])} for step, attempts in expected.items()
    }
    assert sum(len(attempts) for attempts in seen.values()) > STEPS  # some steps had to be made again
