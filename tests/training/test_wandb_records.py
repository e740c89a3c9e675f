"""The reader against files that wandb really wrote."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from wandb_records import BLOCK_BYTES, WandbRun, read_offline_runs, read_run

from ipa.training.loggers import make_wandb

LOSSES = {10: 0.75, 20: 1 / 3, 30: math.inf}
MANY = {f"many/{number}": number / 7 for number in range(3000)}
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """wandb stays in a folder of this test; it stages tables and keeps logs in the home folder otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for kind in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{kind}_DIR", str(tmp_path_factory.mktemp("wandb")))
        yield
        wandb.teardown()


def square(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (4, 4), colour)


def colours(paths: list[Path]) -> list[Any]:
    return [Image.open(path).convert("RGB").getpixel((0, 0)) for path in paths]


def start(folder: Path, **options: Any) -> WandbLogger:
    return make_wandb(folder, project="ipa", name="global-1", group="global", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, _offline: None) -> Path:
    """Of a run that logged something of every kind; only to be read."""
    folder = tmp_path_factory.mktemp("runs") / "global-1"
    logger = start(folder, job_type="train", tags=["sd15", "paper"])
    logger.log_hyperparams({"optimizer": {"lr": 1e-4, "betas": [0.9, 0.999]}, "seed": 0, "data": {"val": None}})
    for step, loss in LOSSES.items():
        logger.log_metrics({"train/loss": loss}, step=step)
    logger.log_image("previews", [square(RED), square(GREEN)], step=10, caption=["a", "b"])
    logger.log_image("previews", [square(BLUE)], step=20)
    logger.log_table("scores", ["metric", "value"], [["clip_i", 0.5]], step=10)
    logger.log_table("scores", ["metric", "value"], [["clip_i", 0.75], ["clip_t", 0.25]], step=30)
    logger.log_metrics(MANY, step=40)
    wandb.finish()
    wandb.teardown()  # ends the process that writes
    return folder


@pytest.fixture
def run(folder: Path) -> WandbRun:
    [run] = read_offline_runs(folder)
    return run


def test_everything_that_was_logged_is_read(run: WandbRun) -> None:
    assert (run.name, run.group, run.project, run.job_type) == ("global-1", "global", "ipa", "train")
    assert run.tags == ["sd15", "paper"] and run.finished
    assert run.config == {"optimizer": {"lr": 1e-4, "betas": [0.9, 0.999]}, "seed": 0, "data": {"val": None}}
    assert run.curve("train/loss") == LOSSES
    assert {step: colours(paths) for step, paths in run.images("previews").items()} == {10: [RED, GREEN], 20: [BLUE]}
    assert run.table("scores") == (["metric", "value"], [["clip_i", 0.75], ["clip_t", 0.25]])
    assert run.summary["train/loss"] == math.inf and run.summary["trainer/global_step"] == 40


def test_a_row_larger_than_several_blocks_and_a_run_that_was_killed(
    run: WandbRun, folder: Path, tmp_path: Path
) -> None:
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, cut = path.read_bytes(), tmp_path / "run-cut.wandb"
    assert len(content) > 4 * BLOCK_BYTES
    assert {name: value for name, value in run.history[-1].items() if name.startswith("many/")} == MANY
    for size in range(0, len(content), 997):
        cut.write_bytes(content[:size])
        killed = read_run(cut)
        assert killed.history == run.history[: len(killed.history)] and not killed.finished


def test_a_resumed_run_is_another_file_with_the_same_id(tmp_path: Path) -> None:
    for steps in (range(1, 4), range(4, 6)):
        logger = start(tmp_path, id="again")
        for step in steps:
            logger.log_metrics({"loss": 1 / step}, step=step)
        wandb.finish()
        wandb.teardown()
        # wandb names folders by the second; these names make room for the next, and their order is not that of time
        latest = (tmp_path / "wandb/latest-run").resolve()
        latest.rename(latest.with_name(f"offline-run-{9 - steps.start}"))

    first, second = read_offline_runs(tmp_path)
    assert (first.id, second.id) == ("again", "again")
    assert list(first.curve("loss")) == [1, 2, 3] and list(second.curve("loss")) == [4, 5]
