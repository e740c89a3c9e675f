"""The reader against files that wandb really wrote."""

import json
import math
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from wandb.proto import wandb_internal_pb2 as pb
from wandb_records import BLOCK_BYTES, HEADER, WandbRun, pieces, read_offline_runs, read_run, records

from ipa.errors import UserError
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
    logger.log_metrics({"single": wandb.Image(square(GREEN))}, step=20)
    logger.log_table("scores", ["metric", "value"], [["clip_i", 0.5]], step=10)
    logger.log_table("scores", ["metric", "value"], [["clip_i", 0.75], ["clip_t", 0.25]], step=30)
    logger.log_metrics({"speed": {"encoder": {"images": 3}, "base": 1.5}}, step=30)
    logger.log_metrics(MANY, step=40)
    logger.experiment.summary["best"] = {"loss": 0.25, "step": 20}
    logger.experiment.summary["gone"] = 1
    del logger.experiment.summary["gone"]
    wandb.finish()
    wandb.teardown()  # ends the process that writes
    return folder


@pytest.fixture
def run(folder: Path) -> WandbRun:
    [run] = read_offline_runs(folder)
    return run


def record_file(folder: Path) -> Path:
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    return path


def test_what_the_run_is_called(run: WandbRun, folder: Path) -> None:
    assert (run.name, run.group, run.project, run.job_type) == ("global-1", "global", "ipa", "train")
    assert run.tags == ["sd15", "paper"]
    assert record_file(folder).name == f"run-{run.id}.wandb"
    assert run.finished


def test_configuration_is_nested_as_it_was_given(run: WandbRun) -> None:
    assert run.config == {"optimizer": {"lr": 1e-4, "betas": [0.9, 0.999]}, "seed": 0, "data": {"val": None}}


def test_a_curve_goes_by_the_step_of_training(run: WandbRun) -> None:
    assert run.curve("train/loss") == LOSSES
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    with pytest.raises(ValueError, match=r"logged no 'loss'; logged were .*scores, .*train/loss"):
        run.curve("loss")
    with pytest.raises(
        ValueError, match="'previews' of kind images/separated at step 10, where int or float was asked for"
    ):
        run.curve("previews")


def test_pictures_are_the_ones_logged(run: WandbRun) -> None:
    assert {step: colours(paths) for step, paths in run.images("previews").items()} == {10: [RED, GREEN], 20: [BLUE]}
    assert {step: colours(paths) for step, paths in run.images("single").items()} == {20: [GREEN]}
    assert next(row for row in run.history if "previews" in row)["previews"]["captions"] == ["a", "b"]


def test_the_last_table_is_read(run: WandbRun) -> None:
    assert run.table("scores") == (["metric", "value"], [["clip_i", 0.75], ["clip_t", 0.25]])


def test_a_logged_dictionary_is_put_together_again(run: WandbRun) -> None:
    with pytest.raises(ValueError, match="'speed' of kind dict at step 30, where image-file or images/separated was"):
        run.images("speed")
    assert [row["speed"] for row in run.history if "speed" in row] == [{"encoder": {"images": 3}, "base": 1.5}]


def test_summary_has_the_last_values_and_what_was_set_and_not_taken_back(run: WandbRun) -> None:
    assert run.summary["train/loss"] == math.inf
    assert run.summary["trainer/global_step"] == 40
    assert run.summary["best"] == {"loss": 0.25, "step": 20}
    assert "gone" not in run.summary
    assert "_wandb" not in run.summary


def test_a_row_larger_than_several_blocks(run: WandbRun, folder: Path) -> None:
    assert record_file(folder).stat().st_size > 4 * BLOCK_BYTES
    assert max(len(data) for data in records(record_file(folder))) > 2 * BLOCK_BYTES
    assert {name: value for name, value in run.history[-1].items() if name.startswith("many/")} == MANY


def test_a_missing_picture_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    [run] = read_offline_runs(tmp_path / "copy")
    run.images("single")[20][0].unlink()
    with pytest.raises(UserError, match=r"the file media/images/single_\w+\.png, which is not in"):
        run.images("single")


def test_a_resumed_run_is_another_file_with_the_same_id(tmp_path: Path) -> None:
    for steps in (range(1, 4), range(4, 6)):
        logger = start(tmp_path, id="again")
        for step in steps:
            logger.log_metrics({"loss": 1 / step}, step=step)
        wandb.finish()
        wandb.teardown()  # ends the process that writes: on a busy machine it may still have something to write
        # wandb names folders by the second; these names make room for the next, and their order is not that of time
        latest = (tmp_path / "wandb/latest-run").resolve()
        latest.rename(latest.with_name(f"offline-run-{9 - steps.start}"))

    first, second = read_offline_runs(tmp_path)
    assert (first.id, second.id) == ("again", "again")
    assert first.started_s < second.started_s
    assert list(first.curve("loss")) == [1, 2, 3]
    assert list(second.curve("loss")) == [4, 5]


def test_of_a_killed_run_the_rows_before_the_break_are_read(run: WandbRun, folder: Path, tmp_path: Path) -> None:
    content = record_file(folder).read_bytes()
    path = tmp_path / "run-cut.wandb"
    counts = []
    for size in [size for at, _, data in pieces(record_file(folder)) for size in (at, at + 3, at + 6 + len(data))]:
        path.write_bytes(content[:size])
        cut = read_run(path)
        assert cut.history == run.history[: len(cut.history)]
        assert not cut.finished  # wandb writes "exit" last
        counts.append(len(cut.history))

    assert counts == sorted(counts)
    assert set(counts) == set(range(len(run.history) + 1))


def test_a_run_killed_before_wandb_wrote_anything_has_only_its_id(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "wandb/offline-run-1-x").mkdir(parents=True)
    (tmp_path / "wandb/offline-run-1-x/run-x.wandb").write_bytes(record_file(folder).read_bytes()[: len(HEADER)])
    [run] = read_offline_runs(tmp_path)

    assert (run.id, run.name, run.config, run.history) == ("x", "", {}, [])
    with pytest.raises(ValueError, match="logged were no values at all"):
        run.curve("loss")


@pytest.mark.parametrize("place", [0, 6, 7, 11, 13, 100, 2 * BLOCK_BYTES, -1])
def test_damage_is_not_taken_for_the_end(folder: Path, tmp_path: Path, place: int) -> None:
    content = bytearray(record_file(folder).read_bytes())
    content[place] ^= 0x80
    path = tmp_path / "run-damaged.wandb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged|is no record file of wandb"):
        read_run(path)


def piece(kind: int, data: bytes) -> bytes:
    return struct.pack("<IHB", zlib.crc32(bytes([kind]) + data), len(data), kind) + data


def row(step: int, text: str) -> bytes:
    values = {"_step": step, "text": text}
    items = [pb.HistoryItem(nested_key=[key], value_json=json.dumps(value)) for key, value in values.items()]
    return pb.Record(history=pb.HistoryRecord(item=items)).SerializeToString()


@pytest.mark.parametrize("left", range(10))
def test_every_end_of_a_block(tmp_path: Path, left: int) -> None:
    """Fewer than 7 bytes are padding; in 7 a record begins with an empty piece."""
    empty = len(HEADER) + len(piece(1, row(0, "x" * 30000))) - 30000
    first = row(0, "x" * (BLOCK_BYTES - left - empty))
    second = row(1, "y")
    content = HEADER + piece(1, first)
    if left < 7:
        content += bytes(left) + piece(1, second)
    else:
        content += piece(2, second[: left - 7]) + piece(4, second[left - 7 :])
    path = tmp_path / "run-x.wandb"
    path.write_bytes(content)

    assert content.index(second[left - 7 if left >= 7 else 0 :]) == BLOCK_BYTES + 7
    assert [values["text"][0] for values in read_run(path).history] == ["x", "y"]


@pytest.mark.parametrize("kinds", [(3,), (4,), (2, 1), (2, 2)])
def test_pieces_out_of_order(tmp_path: Path, kinds: tuple[int, ...]) -> None:
    path = tmp_path / "run-x.wandb"
    path.write_bytes(HEADER + b"".join(piece(kind, row(0, "x")) for kind in kinds))
    with pytest.raises(ValueError, match="a record begins inside another, or goes on without one"):
        read_run(path)
