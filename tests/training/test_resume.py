"""A run that was stopped resumes as if it had never been stopped."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import tiny
from conftest import (
    EVERYTHING,
    EXPERIMENTS,
    FEW,
    PAIRS,
    SIX,
    Run,
    World,
    assert_same_run,
    checkpoint,
    column,
    compose,
    last_checkpoint,
    rewound,
    rows,
    saved_configuration,
    trained,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf

from ipa.errors import UserError
from ipa.training.configuration import differences, read_configuration, settle_configuration
from ipa.training.loggers import RunCSV
from ipa.training.run import finished_summary


@pytest.mark.parametrize(
    "experiment", [EXPERIMENTS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in EXPERIMENTS[1:])]
)
def test_every_variant_resumes_with_everything_that_a_step_can_have(
    train_in: Run, tmp_path: Path, variant, experiment: str
) -> None:
    """Average, schedule with warm-up, clipping and accumulation; no row behind the checkpoint comes twice."""
    folder = rewound(variant(experiment), tmp_path / "x")
    assert checkpoint(folder)["global_step"] == 4 and list(column(folder, "train/loss")) == [1, 2, 3, 4, 5, 6]

    train_in(folder, f"experiment={experiment}", *EVERYTHING)

    assert_same_run(folder, variant(experiment))
    assert len({*column(folder, "train/lr").values()}) > 4  # up, then down
    assert "average.count" in trained(folder)


def test_a_run_with_pairs_resumes_with_another_number_of_workers(
    train_in: Run, tmp_path: Path, six: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = train_in(tmp_path / "whole", *SIX, *PAIRS)
    parts = rewound(whole, tmp_path / "parts")
    shutil.rmtree(tmp_path / "cache")  # the index is made again

    train_in(parts, *SIX, *PAIRS, "data.num_workers=2")

    assert_same_run(parts, whole)
    assert column(whole, "train/loss") != column(six, "train/loss")
    with pytest.raises(UserError, match=r"data\.pairs\.by: saved style, given null"):
        train_in(parts, *SIX, "trainer.max_steps=8")


def settle(train_in: Run, folder: Path, *overrides: str) -> None:
    """As far as a run compares its configuration."""
    train_in(folder, *SIX, "trainer.max_steps=4", *overrides)


def test_an_option_that_would_change_steps_already_made_is_refused(train_in: Run, half_done: Path) -> None:
    saved = (half_done / "config.yaml").read_bytes()
    with pytest.raises(UserError) as refused:
        settle(train_in, half_done, "optimizer.lr=5", "+optimizer.foreach=false", "data.num_workers=1")

    message = str(refused.value)
    assert "optimizer.lr: saved 0.001, given 5" in message
    assert "optimizer.lr=0.001" in message and "~optimizer.foreach" in message and "name=" in message
    assert "num_workers" not in message
    assert (half_done / "config.yaml").read_bytes() == saved
    with pytest.raises(UserError, match=r"(?s)optimizer\.weight_decay.* \+optimizer\.weight_decay=0\.01"):
        settle(train_in, half_done, "~optimizer.weight_decay")


def test_an_option_that_changes_no_step_is_taken_and_logged(
    train_in: Run, half_done: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ipa")
    settle(train_in, half_done, "data.num_workers=1", "preview.every_n_steps=3", "sampling.guidance=2")

    assert "data.num_workers: 1, before 0" in caplog.messages
    assert "preview.every_n_steps: 3, before 2" in caplog.messages
    assert not [message for message in caplog.messages if str(half_done.parent) in message and ", before" in message]
    assert saved_configuration(half_done).data.num_workers == 1


@pytest.mark.parametrize(("name", "what"), [("data.train", "other shards"), ("base.path", "other weights")])
def test_something_else_in_the_place_of_data_or_weights_is_refused(
    train_in: Run, half_done: Path, world: World, tmp_path: Path, name: str, what: str
) -> None:
    if name == "data.train":
        shutil.copytree(world.train, tmp_path / "other")
        (tmp_path / "other/00001.tar").rename(tmp_path / "other/00009.tar")
        saved = world.train
    else:
        tiny.make_pipeline(tiny.make_family(seed=5)).save_pretrained(tmp_path / "other")
        saved = world.base
    with pytest.raises(UserError, match=rf"{re.escape(name)}={tmp_path}/other has {what} than {saved}.*resume="):
        train_in(half_done, *SIX, f"{name}={tmp_path}/other")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["experiment=simple_global"], "simple"),
        (["tokens.num_tokens=8"], "tokens"),
        (["ema.decay=0.9"], "ema.decay=null"),
        (["optimizer=muon"], r"trained with AdamW, not MuonWithAdamW.*adapter\.init_from="),
    ],
)
def test_the_checkpoint_of_another_kind_of_run_is_refused(
    train_in: Run, first_four: Path, tmp_path: Path, overrides: list[str], reason: str
) -> None:
    start = last_checkpoint(first_four)
    with pytest.raises(UserError, match=rf"resume={start}.*{reason}"):
        train_in(tmp_path / "x", *SIX, "adapter.layout=ipa", *overrides, f"resume={start}")


@pytest.mark.parametrize("content", ["", "a: [", "[1]", "optimizer: {lr: 5}", "paths: {run: 3}", "${x}: {"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml is not the configuration of a run.*resume="):
        read_configuration(tmp_path / "config.yaml")


def test_the_saved_configuration_is_never_instantiated(train_in: Run, half_done: Path, tmp_path: Path) -> None:
    """It may come from somebody else: what it says is compared, and refused."""
    cfg = saved_configuration(half_done)
    OmegaConf.update(cfg, "data._target_", "os.mkdir")
    OmegaConf.update(cfg, "callbacks.evil", {"_target_": "os.mkdir", "path": f"{tmp_path}/evil"}, force_add=True)
    OmegaConf.save(cfg, half_done / "config.yaml")

    with pytest.raises(UserError, match=r"data\._target_: saved os\.mkdir"):
        settle(train_in, half_done)
    assert not (tmp_path / "evil").exists()


def test_expressions_of_the_environment_are_compared_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_TOKEN", "first-secret-1234")
    train = "data.train='https://host/{0..9}.tar?token=${oc.env:DATA_TOKEN}'"
    settled, _ = settle_configuration(compose(tmp_path, train), tmp_path, resumes=False)
    text = (tmp_path / "config.yaml").read_text()

    assert settled.data.train.endswith("token=first-secret-1234")
    assert "first-secret" not in text and "${oc.env:DATA_TOKEN}" in text
    monkeypatch.setenv("DATA_TOKEN", "second-secret-1234")
    again, _ = settle_configuration(compose(tmp_path, train), tmp_path, resumes=True)
    assert again.data.train.endswith("token=second-secret-1234")


def test_only_the_place_of_the_run_may_differ_unnoticed() -> None:
    one = {"paths": {"run": "/a/x"}, "b": {"path": "/a/x/y"}, "c": "/a/xy"}
    other = {"paths": {"run": "/z"}, "b": {"path": "/z/y"}, "c": "/z/xy"}
    assert list(differences(one, other)) == ["c"]


def test_one_process_of_all_saves_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(tmp_path)
    for rank in (1, 0):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        settle_configuration(cfg, tmp_path, resumes=False)
        assert (tmp_path / "config.yaml").exists() == (rank == 0)


def test_a_finished_run_is_left_as_it_is(train_in: Run, six: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ipa")
    files = [path for path in six.rglob("*") if path.name != "config.yaml" and path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}

    train_in(six, *SIX)

    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "is finished" in caplog.text and "trainer.max_steps=" in caplog.text


@pytest.mark.parametrize("damaged", ["", '{"steps": 4, "adap', '{"steps": null}', "[4]", '{"steps": 9, "scores": [1]}'])
def test_a_damaged_summary_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str) -> None:
    (tmp_path / "summary.json").write_text(damaged)
    assert finished_summary(tmp_path, 4) is None
    assert "summary.json is damaged" in caplog.text


def test_a_run_that_ended_while_it_was_scored_is_scored_again(train_in: Run, tmp_path: Path, finished: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "x"))
    (folder / "summary.json").unlink()

    train_in(folder)

    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, finished)]
    assert summaries[0]["scores"] == summaries[1]["scores"]
    assert summaries[0]["steps"] == 4
    assert rows(folder) == rows(finished)


def test_a_run_that_failed_before_its_first_checkpoint_starts_anew(
    train_in: Run, tmp_path: Path, first_four: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/config.yaml").write_text("optimizer: {lr: 5}\n")
    (tmp_path / "x/log.csv").write_text("step,train/loss\n1,77\n2,77\n")

    folder = train_in(tmp_path / "x", *FEW, "trainer.max_steps=2")

    assert [*column(folder, "train/loss").values()] == [*column(first_four, "train/loss").values()][:2]
    assert saved_configuration(folder).optimizer.lr == 0.001


def test_a_log_that_was_cut_off_anywhere_is_resumed(tmp_path: Path) -> None:
    """A full disk takes a part of what is written."""
    path, row = tmp_path / "log.csv", {"a": 12.0, "z": 12.5}
    whole = b"step,a,z\r\n11,11.0,11.5\r\n12,12.0,12.5\r\n"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        logger = RunCSV(tmp_path)

        logger.resume(12, row)
        logger.save()

        lines = path.read_bytes().splitlines(keepends=True)
        assert [lines[0], lines[-1]] == [b"step,a,z\r\n", b"12,12.0,12.5\r\n"]
        assert (b"11,11.0,11.5\r\n" in lines) == (length >= whole.index(b"\n12,"))
    path.write_bytes(b"\0" * 50 + whole[10:])
    with pytest.raises(UserError, match=r"log\.csv is damaged: it has no column step"):
        RunCSV(tmp_path).resume(12, row)


def test_the_log_has_one_row_per_step_and_cuts_those_that_are_repeated(tmp_path: Path) -> None:
    def log(logger: RunCSV, step: int) -> None:
        logger.log_metrics({"early": step}, step)
        logger.log_metrics({"late": step}, step)
        logger.save()

    logger = RunCSV(tmp_path)
    for step in (1, 2, 3):
        log(logger, step)
    resumed = RunCSV(tmp_path)
    resumed.resume(2, {"early": 2})
    resumed.log_metrics({"preview": 0.5}, 2)
    log(resumed, 3)

    assert (tmp_path / "log.csv").read_text().splitlines() == [
        "step,early,late,preview",
        "1,1,1,",
        "2,2,2,0.5",
        "3,3,3,",
    ]
