"""What a dashboard shows of a run: curves, pictures, the parameters, the configuration; wandb offline, TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import wandb
from conftest import SCORED, World, column, run_training, saved_configuration
from omegaconf import OmegaConf
from PIL import Image
from wandb_records import WandbRun, logged_out, read_offline_runs

from ipa.cli import explain_failure
from ipa.errors import UserError
from ipa.training.loggers import make_wandb

CURVES = ("train/loss", "image_prompt/gap", "train/lr", "train/grad_norm", "train/samples_per_s")
BUCKETS = [f"train/error_t/{bucket}" for bucket in ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty home folder of a user who is not logged in."""
    folder = tmp_path_factory.mktemp("home")
    with logged_out(folder) as patch:
        patch.setenv("WANDB_MODE", "offline")
        yield folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, world: World, home: Path) -> Path:
    """Of a run of four steps with wandb; only to be read."""
    folder = tmp_path_factory.mktemp("runs") / "shown"
    try:
        few = (*SCORED, "image_prompt_check.every_n_steps=1")
        return run_training(folder, *world.overrides(), *few, "seed=7", "group=ours")
    finally:
        wandb.finish()
        wandb.teardown()  # ends the process that writes: on a busy machine it may still have something to write


@pytest.fixture(scope="module")
def run(folder: Path) -> WandbRun:
    [run] = read_offline_runs(folder)
    assert run.finished
    return run


def test_curves_have_the_values_and_steps_of_the_log(run: WandbRun, folder: Path) -> None:
    """Four samples a step leave one of five buckets empty at least, which then shows nothing, nothing old either."""
    scores = [f"preview/{score}" for score in ("clip_i", "clip_t", "retrieval_at_1", "border_lab")]
    for name in (*CURVES, *BUCKETS, *scores):
        assert run.curve(name) == {step: float(value) for step, value in column(folder, name).items()}
        assert name in BUCKETS or list(run.curve(name)) == ([2, 4] if name in scores else [1, 2, 3, 4]), name
    assert list(run.curve("train/lr").values()) == pytest.approx([0.001] * 4)
    for step in (1, 2, 3, 4):
        assert 1 <= sum(step in run.curve(name) for name in BUCKETS) <= 4


def test_name_configuration_previews_and_final_scores_are_shown(run: WandbRun, folder: Path, home: Path) -> None:
    assert (run.name, run.group, run.project) == ("ours/shown", "ours", "ipa")
    assert run.config == OmegaConf.to_container(saved_configuration(folder))
    assert run.config["callbacks"]["previews"]["folder"] == str(folder / "previews")
    shown = run.images("preview/grid")
    assert list(shown) == [2, 4]
    for step, [path] in shown.items():
        kept = Image.open(folder / f"previews/step_{step:06d}.png").convert("RGB")
        assert Image.open(path).convert("RGB").tobytes() == kept.tobytes()
    scores = json.loads((folder / "summary.json").read_text())["scores"]
    assert run.summary["scores/scale 1/clip_i"] == scores["scale 1"]["clip_i"]
    assert {name for name in run.summary if name.startswith("scores/scale 0/")}
    assert [path for path in home.rglob("*") if path.is_file()] == []  # all of it is in the run's folder


def test_a_resumed_run_is_another_file_with_the_same_id(home: Path, tmp_path: Path) -> None:
    for steps in (range(1, 4), range(4, 6)):
        logger = make_wandb(tmp_path, project="ipa", name="x")
        for step in steps:
            logger.log_metrics({"loss": 1 / step}, step=step)
        wandb.finish()
        wandb.teardown()
        # wandb names folders by the second; these names make room for the next, and their order is not that of time
        latest = (tmp_path / "wandb/latest-run").resolve()
        latest.rename(latest.with_name(f"offline-run-{9 - steps.start}"))

    first, second = read_offline_runs(tmp_path)
    assert first.id == second.id
    assert list(first.curve("loss")) == [1, 2, 3] and list(second.curve("loss")) == [4, 5]


def test_wrong_settings_are_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[tuple[dict[str, str | None], str]] = [
        ({"project": "a/b"}, r"logger\.wandb\.project=a/b"),
        ({"project": None}, r"logger\.wandb\.project=None"),
        ({"entitty": "me"}, r"logger\.wandb has no option entitty"),
    ]
    for option, message in options:
        with pytest.raises(UserError, match=message):
            make_wandb(tmp_path, **{"project": "ipa", "name": "x", **option})
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match="WANDB_MODE=onlin: give one of online, offline"):
        make_wandb(tmp_path, project="ipa", name="x")


@pytest.fixture
def logged_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    return monkeypatch


class Refuses(BaseHTTPRequestHandler):
    """A server that is there, but is no wandb."""

    def do_GET(self) -> None:
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    "server", ["silent", *(pytest.param(each, marks=pytest.mark.slow) for each in ("absent", "refuses"))]
)
def test_without_a_dashboard_the_run_is_recorded_offline(
    logged_in: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, server: str
) -> None:
    """Within seconds, and with a warning."""
    with HTTPServer(("127.0.0.1", 0), Refuses) as listening:
        logged_in.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{9 if server == 'absent' else listening.server_port}")
        if server == "refuses":
            Thread(target=listening.serve_forever, daemon=True).start()
        began = time.monotonic()
        try:
            logger = make_wandb(tmp_path, project="ipa", name="x")
            logger.log_metrics({"loss": 1.0}, step=1)
            waited_s = time.monotonic() - began
        finally:
            wandb.finish()
            wandb.teardown()
            if server == "refuses":
                listening.shutdown()

    [run] = read_offline_runs(tmp_path)
    assert run.curve("loss") == {1: 1.0} and waited_s < 20
    assert "wandb does not start" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_a_missing_tensorboard_is_reported(world: World, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="tensorboard") as caught:
        run_training(tmp_path / "x", *world.overrides(), "logger=tensorboard")

    assert explain_failure(caught.value) == (
        "logger=tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'"
    )


def test_tensorboard_shows_the_same(world: World, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_training(tmp_path / "x", *world.overrides(), "logger=tensorboard", "scoring=null")
    events = EventAccumulator(str(tmp_path / "x/tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()

    for name in ("train/loss", "train/lr"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({step: float(value) for step, value in column(tmp_path / "x", name).items()})
    assert [event.step for event in events.Scalars("preview/clip_i")] == [2, 4]
    assert [event.step for event in events.Images("preview/grid")] == [2, 4]
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    assert texts >= {"configuration"}
    with (tmp_path / "x/log.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
