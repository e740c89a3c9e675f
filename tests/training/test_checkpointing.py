"""Checkpoints beside a training: written by a thread, the newest whole one found again, the others removed."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from bystanders import dice, train_of_ranks
from conftest import Run, World, checkpoint, column, last_checkpoint, rows
from ranks import WORLD, together
from test_resume import SIX, assert_same_run

from ipa.errors import UserError
from ipa.training.checkpointing import (
    BackgroundCheckpointIO,
    Checkpoints,
    checkpoints_in,
    newest_whole,
    prune,
    read_checkpoint,
)
from ipa.training.loggers import ContinuedWriter
from ipa.training.run import where_to_start
from ipa.training.sealed import write_sealed


def write(folder: Path, *steps: int) -> list[Path]:
    paths = [folder / f"step_{step:08d}.ckpt" for step in steps]
    for step, path in zip(steps, paths, strict=True):
        write_sealed(path, {"state_dict": {"weight": torch.full((50,), float(step))}, "global_step": step})
    return paths


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_is_of_the_moment_when_it_was_asked_for(tmp_path: Path) -> None:
    io, weight, group, go = BackgroundCheckpointIO(), torch.zeros(3), {"lr": 1.0}, threading.Event()
    io.do(lambda: go.wait() and None)  # the thread is busy, so it comes to the writing later

    io.pending.clear()  # which `save_checkpoint` would wait for
    io.save_checkpoint({"weight": weight, "groups": [group]}, tmp_path / "a.ckpt")
    weight += 1
    group["lr"] = 2.0
    go.set()
    io.teardown()

    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["weight"].tolist() == [0, 0, 0] and saved["groups"] == [{"lr": 1.0}]


def test_what_the_thread_could_not_write_is_told_and_nothing_is_removed_then(tmp_path: Path) -> None:
    io, (good,) = BackgroundCheckpointIO(), write(tmp_path, 1)
    (tmp_path / "file").write_text("no folder")

    io.save_checkpoint({}, tmp_path / "file" / "step_2.ckpt")
    io.remove_checkpoint(good)

    with pytest.raises(UserError, match="file"):
        io.wait()
    io.pending.clear()
    assert good.is_file()


def test_the_newest_whole_one_is_taken_and_broken_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    oldest, older, newer, newest = write(tmp_path, 9, 10, 200, 1000)
    assert newest_whole(tmp_path) == newest and not caplog.records

    damage(newest)
    newer.write_bytes(newer.read_bytes()[:100])

    assert newest_whole(tmp_path) == older
    assert [record.getMessage().split(" is passed over")[0] for record in caplog.records] == [str(newest), str(newer)]
    damage(older)
    damage(oldest)
    assert newest_whole(tmp_path) is None


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("last.ckpt", ".step_00000009.ckpt.12.tmp", "step_9.ckpt.bak", "step_x.ckpt"):
        (tmp_path / name).write_bytes(b"")
    assert checkpoints_in(tmp_path) == [] and newest_whole(tmp_path) is None
    assert checkpoints_in(tmp_path / "nowhere") == []


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    paths = write(tmp_path, 1, 2, 3, 4, 5, 90)

    prune(tmp_path, step=5, keep_last=2, best=paths[1].name)

    # 90 is of a run that went further and broke; this one has to come so far before it goes
    assert checkpoints_in(tmp_path) == [paths[5], paths[4], paths[3], paths[1]]


def test_none_to_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last=0: at least 1"):
        Checkpoints(tmp_path, 10, 10, "preview/clip_i", keep_last=0)


def test_where_a_run_starts(tmp_path: Path) -> None:
    folder, (other,) = tmp_path / "checkpoints", write(tmp_path / "other", 7)
    assert where_to_start(folder, "auto") is where_to_start(folder, "never") is None
    assert where_to_start(folder, str(other)) == other

    first, second = write(folder, 1, 2)
    assert where_to_start(folder, "auto") == where_to_start(folder, str(other)) == second
    with pytest.raises(ValueError, match=r"resume=never, but .*another name="):
        where_to_start(folder, "never")

    damage(second)
    assert where_to_start(folder, "auto") == first
    damage(first)
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* is whole.*move them away"):
        where_to_start(folder, "auto")


def test_a_file_to_start_from_that_is_none_is_refused_in_words(tmp_path: Path) -> None:
    (good,) = write(tmp_path, 1)
    with pytest.raises(ValueError, match=r"resume=.*no\.ckpt: no such checkpoint. Give auto, never, or a file"):
        where_to_start(tmp_path / "run", str(tmp_path / "no.ckpt"))
    with pytest.raises(UserError, match=rf"no\.ckpt: no such checkpoint; there: {good.name}"):
        read_checkpoint(tmp_path / "no.ckpt")
    write_sealed(tmp_path / "thing.ckpt", {"weight": torch.zeros(1)})
    for path in (tmp_path / "thing.ckpt", tmp_path / "torn.ckpt"):
        path.exists() or path.write_bytes(b"PK")
        with pytest.raises(ValueError, match=rf"{path.name} is not a checkpoint of a training"):
            read_checkpoint(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, train_in: Run) -> Path:
    return train_in(tmp_path_factory.mktemp("runs") / "whole", *SIX)


def test_a_run_goes_on_from_before_a_broken_checkpoint(
    train_in: Run, tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train_in(tmp_path / "x", *SIX, "trainer.max_steps=4")
    broken = last_checkpoint(folder)
    damage(broken)
    caplog.clear()

    train_in(folder, *SIX)

    assert f"{broken} is passed over: its content is not what was written" in caplog.text
    assert_same_run(folder, whole)


def test_a_run_starts_from_the_checkpoint_of_another(train_in: Run, tmp_path: Path, whole: Path) -> None:
    first = train_in(tmp_path / "first", *SIX, "trainer.max_steps=4")
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    begin = f"resume={last_checkpoint(first)}"

    second = train_in(tmp_path / "second", *SIX, begin)
    (second / "summary.json").unlink()
    train_in(second, *SIX, begin)  # it has checkpoints of its own by now

    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert column(second, "train/loss") == {k: v for k, v in column(whole, "train/loss").items() if k > 4}
    assert checkpoint(second)["global_step"] == 6
    for name, tensor in checkpoint(whole)["state_dict"].items():
        assert torch.equal(checkpoint(second)["state_dict"][name], tensor)


def test_the_row_of_a_checkpoints_step_is_not_lost(train_in: Run, tmp_path: Path, whole: Path) -> None:
    """A kill may come when the checkpoint is on disk and its row in the log is not."""
    folder = train_in(tmp_path / "x", *SIX, "trainer.max_steps=4")
    lines = (folder / "log.csv").read_text().splitlines(keepends=True)
    (folder / "log.csv").write_text("".join(lines[:-1]))

    train_in(folder, *SIX)

    assert_same_run(folder, whole)
    clocks = ("train/samples_per_s", "train/step_s", "train/data_wait_s")
    known = [name for name in rows(whole)[3] if name not in clocks]
    assert [rows(folder)[3].get(name) for name in known] == [rows(whole)[3][name] for name in known]


def test_a_log_whose_last_row_was_torn_anywhere_is_gone_on_with(tmp_path: Path) -> None:
    """A full disk takes a part of what is written."""
    path, row = tmp_path / "log.csv", {"a": 12.0, "z": 12.5}
    whole = b"a,step,z\r\n11.0,11,11.5\r\n12.0,12,12.5\r\n"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])

        ContinuedWriter(str(tmp_path)).continue_after(12, row)

        lines = path.read_bytes().splitlines(keepends=True)
        assert [lines[0], lines[-1]] == [b"a,step,z\r\n", b"12.0,12,12.5\r\n"]
        assert (b"11.0,11,11.5\r\n" in lines) == (length >= whole.index(b"\n12.0"))
    path.write_bytes(b"\0" * 50 + whole[10:])
    with pytest.raises(ValueError, match=r"log\.csv is damaged: it has no column step\. Move it away"):
        ContinuedWriter(str(tmp_path)).continue_after(12, row)


@pytest.mark.slow
def test_ranks_that_see_different_checkpoints_are_refused(train_in: Run, world: World, tmp_path: Path) -> None:
    """The run's folder is on the disk of one machine, and its ranks would go on alone."""
    ranks = ("trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={WORLD}", "trainer.precision=32-true")
    quiet = ("data.val=null", "scoring=null", "image_prompt_check.every_n_steps=0")
    common = [*world.overrides(), "~logger.wandb", *ranks, *quiet, "trainer.max_steps=4"]
    folders = [tmp_path / "x", tmp_path / "y"]
    train_in(folders[0], *quiet, "trainer.max_steps=2")

    together(train_of_ranks, folders, [common] * WORLD)

    for rank, folder in enumerate(folders):
        end = (tmp_path / f"end_{rank}").read_text()
        assert f"see different checkpoints in {folder}" in end
        assert "rank 0 goes on from step 2, rank 1 from step 0. All machines need the same folder" in end


def test_a_killed_process_leaves_nothing_begun(train_in: Run, tmp_path: Path, finished: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "x"))
    begun = folder / "checkpoints/.step_00000005.ckpt.99.tmp"
    begun.write_bytes(b"PK")

    train_in(folder, "trainer.max_steps=5", "scoring=null")

    assert not begun.exists() and checkpoint(folder)["global_step"] == 5


def test_parts_that_draw_by_themselves_go_on_with_the_same_draws(train_in: Run, tmp_path: Path) -> None:
    """torch's, numpy's and Python's own generators, as dropout or somebody's augmentation would use them."""
    train_in(tmp_path / "whole", *SIX, *dice(tmp_path / "whole.txt"))
    train_in(tmp_path / "x", *SIX, "trainer.max_steps=4", *dice(tmp_path / "parts.txt"))

    train_in(tmp_path / "x", *SIX, *dice(tmp_path / "parts.txt"))

    draws = (tmp_path / "whole.txt").read_text().splitlines()
    assert len(draws) == len(set(draws)) == 6
    assert (tmp_path / "parts.txt").read_text().splitlines() == draws
