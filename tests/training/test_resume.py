"""A run that was stopped goes on as if nothing had been."""

import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bystanders import stopping
from conftest import EVERYTHING, EXPERIMENTS, Command, Run, checkpoint, column, compose, rows, saved_configuration
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from safetensors.torch import load_file

from ipa.training.checkpointing import checkpoints_in
from ipa.training.configuration import settle_configuration

SIX = ("trainer.max_steps=6", "scoring=null", "image_prompt_check.every_n_steps=2")


SAME = ("train/loss", "train/lr", "train/grad_norm", "image_prompt/gap", "preview/clip_i", "preview/border_lab")


def trained(folder: Path) -> dict[str, Any]:
    """Weights, their average, optimizer and schedule of the last checkpoint."""
    saved = checkpoint(folder)
    return {**saved["state_dict"], **saved["optimizer_states"][0]["state"], "schedule": saved["lr_schedulers"]}


def assert_same_run(one: Path, other: Path) -> None:
    for name in SAME:
        assert column(one, name) == column(other, name)
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(other)]
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files == sorted(path.name for path in other.glob("*.safetensors"))
    for name in files:
        torch.testing.assert_close(load_file(one / name), load_file(other / name), rtol=0, atol=0)
    torch.testing.assert_close(trained(one), trained(other), rtol=0, atol=0)
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (one, other)]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, train_in: Run) -> Path:
    """Six steps without a stop; a pass over the data has six."""
    return train_in(tmp_path_factory.mktemp("runs") / "whole", *SIX)


def test_longer_max_steps_lets_a_finished_run_go_on(train_in: Run, tmp_path: Path, whole: Path) -> None:
    folder = train_in(tmp_path / "x", *SIX, "trainer.max_steps=4")
    before = rows(folder)

    train_in(folder, *SIX)

    assert rows(folder)[:4] == before
    assert_same_run(folder, whole)
    assert saved_configuration(folder).trainer.max_steps == 6


def test_run_goes_on_after_a_failure(train_in: Run, tmp_path: Path, whole: Path) -> None:
    """Step 5 was logged, but the last checkpoint is of step 4: the row must not come twice."""
    stop = stopping(5, tmp_path / "stop")
    with pytest.raises(RuntimeError, match="on purpose"):
        train_in(tmp_path / "x", *SIX, *stop)
    assert list(column(tmp_path / "x", "train/loss")) == [1, 2, 3, 4, 5]

    train_in(tmp_path / "x", *SIX, *stop)

    assert_same_run(tmp_path / "x", whole)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_variant_goes_on_with_all_that_a_step_can_have(
    train_in: Run, tmp_path: Path, variants: dict[str, Path], experiment: str
) -> None:
    """Average, schedule with warm-up, clipping and accumulation; stopped after step 3, a step behind the checkpoint."""
    folder, stop = tmp_path / "x", stopping(3, tmp_path / "stop")
    overrides = (f"experiment={experiment}", *EVERYTHING, *stop)
    with pytest.raises(RuntimeError, match="on purpose"):
        train_in(folder, *overrides)
    assert checkpoint(folder)["global_step"] == 2

    train_in(folder, *overrides)

    assert_same_run(folder, variants[experiment])
    assert len({*column(folder, "train/lr").values()}) > 4  # up, then down
    assert "average.count" in trained(folder)


def test_saved_configuration_wins_and_differences_are_told(
    train_in: Run, tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train_in(tmp_path / "x", *SIX, "trainer.max_steps=2")
    caplog.clear()

    train_in(folder, *SIX, "optimizer.lr=5", "data.num_workers=1")

    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message for message in told if "stays" in message] == [
        "optimizer.lr stays 0.001; you asked for 5, which needs a run of its own (another name=)"
    ]
    assert saved_configuration(folder).optimizer.lr == 0.001
    assert_same_run(folder, whole)


def test_run_goes_on_where_its_folder_was_moved_to(train_in: Run, tmp_path: Path, whole: Path) -> None:
    first = train_in(tmp_path / "first", *SIX, "trainer.max_steps=2")
    second = tmp_path / "elsewhere" / "second"
    second.parent.mkdir()
    first.rename(second)

    train_in(second, *SIX)

    assert not first.exists()
    assert_same_run(second, whole)
    assert str(first) not in (second / "config.yaml").read_text()


def test_accumulated_gradients_go_on_exactly(train_in: Run, tmp_path: Path) -> None:
    few = ("trainer.max_steps=4", "preview.num_prompts=1", "preview.num_scored=1")
    accumulate = (*SIX, *few, "trainer.accumulate_grad_batches=2")
    whole = train_in(tmp_path / "whole", *accumulate)
    parts = train_in(tmp_path / "parts", *accumulate, "trainer.max_steps=2")

    train_in(parts, *accumulate)

    assert_same_run(parts, whole)


def test_finished_run_is_left_as_it_is(train_in: Run, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ipa")
    before = {
        path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != "config.yaml" and path.is_file()
    }

    train_in(whole, *SIX)

    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "is finished" in caplog.text
    assert "trainer.max_steps=" in caplog.text


def test_run_that_ended_while_it_was_scored_is_scored_again(train_in: Run, tmp_path: Path, finished: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "x"))
    (folder / "summary.json").unlink()

    train_in(folder)

    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, finished)]
    assert summaries[0]["scores"] == summaries[1]["scores"]
    assert summaries[0]["steps"] == 4
    assert rows(folder) == rows(finished)


@pytest.mark.parametrize("damaged", ["", '{"steps": 4, "adap', '{"steps": null}', "[4]", '{"steps": 9, "scores": [1]}'])
def test_a_damaged_summary_is_made_again(
    train_in: Run, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "x"))
    (folder / "summary.json").write_text(damaged)

    train_in(folder, "scoring=null")

    assert f"{folder}/summary.json is damaged" in caplog.text
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4


def test_one_process_of_all_saves_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(tmp_path)
    for rank in (1, 0):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        settle_configuration(cfg, tmp_path, goes_on=False)
        assert (tmp_path / "config.yaml").exists() == (rank == 0)


def test_run_that_failed_before_its_first_checkpoint_begins_anew(train_in: Run, tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "config.yaml").write_text("optimizer: {lr: 5}\n")
    (folder / "log.csv").write_text("step,train/loss\n1,77\n2,77\n")

    train_in(folder)

    assert column(folder, "train/loss") == column(finished, "train/loss")
    assert saved_configuration(folder).optimizer.lr == 0.001


@pytest.mark.slow
def test_run_survives_kills_at_any_moment(start: Command, train_in: Run, tmp_path: Path) -> None:
    """Kill -9 five times, at moments that differ from run to run; then the end is that of a run in one go."""
    few = ("preview.num_prompts=1", "preview.num_scored=1", "scoring=null")
    many = ("trainer.max_steps=100", "preview.every_n_steps=1", *few)
    folder, draw = tmp_path / "runs/decoupled_global/x", random.Random()
    kills = 0
    for _ in range(5):
        process = start("~logger.wandb", *many)
        before = checkpoints_in(folder / "checkpoints")[:1]
        while process.poll() is None and checkpoints_in(folder / "checkpoints")[:1] == before:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 1))
        kills += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        saved = checkpoint(folder)  # the file is whole, and so is the log up to it
        assert set(column(folder, "train/loss")) >= set(range(1, saved["global_step"]))
    process = start("~logger.wandb", *many)
    output, _ = process.communicate(timeout=300)

    assert process.returncode == 0, output
    assert kills >= 3
    assert_same_run(folder, train_in(tmp_path / "whole", *many))
