"""Checkpoints: whole or refused, written by a thread, the newest whole one found again, the others removed."""

import random
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from bystanders import train_of_ranks
from conftest import (
    QUIET,
    SIX,
    Run,
    World,
    assert_same_run,
    checkpoint,
    column,
    last_checkpoint,
    rows,
    saved_configuration,
)
from ranks import WORLD, together

from ipa.errors import UserError
from ipa.export.storage import save_adapter
from ipa.training.checkpointing import (
    BackgroundCheckpointIO,
    BrokenCheckpoint,
    checkpoints_in,
    load,
    newest_whole,
    prune,
    read_checkpoint,
    where_to_start,
    write_checkpoint,
)

CONTENT = {"state_dict": {"weight": torch.arange(300.0)}, "global_step": 7, "lanes": [[0, 1], (2, "x")], "none": None}


def write(folder: Path, *steps: int) -> list[Path]:
    paths = [folder / f"step_{step:08d}.ckpt" for step in steps]
    for step, path in zip(steps, paths, strict=True):
        write_checkpoint(path, {"state_dict": {"weight": torch.full((50,), float(step))}, "global_step": step})
    return paths


def damage(path: Path) -> None:
    """Flip a bit of the largest member: torch pads between members, where a bit means nothing."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        stored = archive.read(largest)
    content = bytearray(path.read_bytes())
    content[content.index(stored, largest.header_offset) + len(stored) // 2] ^= 1
    path.write_bytes(content)


def same(content: dict[str, Any]) -> bool:
    rest = {name: value for name, value in CONTENT.items() if name != "state_dict"}
    weight = content.pop("state_dict")["weight"]
    return torch.equal(weight, CONTENT["state_dict"]["weight"]) and content == rest  # type: ignore[index]


def test_a_changed_bit_is_noticed_or_changes_nothing_and_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    """Only padding and dates of the archive are not covered. Earlier versions had a SHA-256 in its comment."""
    path, draw, noticed = tmp_path / "a.ckpt", random.Random(0), 0
    write_checkpoint(path, CONTENT)
    assert same(load(path)) and same(torch.load(path, weights_only=True)) and list(tmp_path.iterdir()) == [path]
    whole, seal = path.read_bytes(), b"sha256:" + b"0" * 64
    path.write_bytes(whole[:-2] + len(seal).to_bytes(2, "little") + seal)
    assert same(read_checkpoint(path))
    for place in draw.sample(range(len(whole)), 300):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert same(load(path))
        except BrokenCheckpoint:
            noticed += 1
    assert noticed > 150
    for length in [*range(0, len(whole) - 1, 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenCheckpoint):
            load(path)


def test_a_disk_that_fills_up_leaves_what_was_there(small_disk: Path) -> None:
    write_checkpoint(small_disk / "step_1.ckpt", {**CONTENT, "state_dict": {"weight": torch.ones(500_000)}})

    with pytest.raises(UserError, match=r"could not write .*No space left.*checkpoint\.keep_last"):
        write_checkpoint(small_disk / "step_2.ckpt", {"weight": torch.ones(900_000)})

    with pytest.raises(UserError, match=r"could not write .*No space left"):
        save_adapter(small_disk / "adapter.safetensors", {"weight": torch.ones(900_000)}, {})
    assert [path.name for path in small_disk.iterdir()] == ["step_1.ckpt"]
    assert torch.equal(load(small_disk / "step_1.ckpt")["state_dict"]["weight"], torch.ones(500_000))


def test_a_checkpoint_is_of_the_moment_when_it_was_requested(tmp_path: Path) -> None:
    io, weight, group, go = BackgroundCheckpointIO(), torch.zeros(3), {"lr": 1.0}, threading.Event()
    io.submit(lambda: go.wait() and None)  # the thread is busy, so it writes later

    io.pending.clear()  # `save_checkpoint` would wait for it
    io.save_checkpoint({"weight": weight, "groups": [group]}, tmp_path / "a.ckpt")
    weight += 1
    group["lr"] = 2.0
    go.set()
    io.teardown()

    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["weight"].tolist() == [0, 0, 0] and saved["groups"] == [{"lr": 1.0}]


def test_an_error_of_the_thread_is_raised_and_nothing_is_removed_then(tmp_path: Path) -> None:
    io, (good,) = BackgroundCheckpointIO(), write(tmp_path, 1)
    (tmp_path / "file").write_text("no folder")

    io.save_checkpoint({}, tmp_path / "file" / "step_2.ckpt")
    io.submit(lambda: prune(tmp_path, step=2, keep_last=0, best=""))

    with pytest.raises(UserError, match="file"):
        io.wait()
    io.wait()
    assert good.is_file()


def test_the_newest_whole_one_is_taken_and_broken_ones_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("last.ckpt", ".step_00000009.ckpt.12.tmp", "step_9.ckpt.bak", "step_x.ckpt"):
        (tmp_path / name).write_bytes(b"")
    assert checkpoints_in(tmp_path) == checkpoints_in(tmp_path / "nowhere") == []
    oldest, older, newer, newest = write(tmp_path, 9, 10, 200, 1000)
    assert newest_whole(tmp_path) == newest and not caplog.records

    damage(newest)
    newer.write_bytes(newer.read_bytes()[:100])

    assert newest_whole(tmp_path) == older
    assert [message.split(" is skipped")[0] for message in caplog.messages] == [str(newest), str(newer)]
    damage(older)
    damage(oldest)
    assert newest_whole(tmp_path) is None


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    paths = write(tmp_path, 1, 2, 3, 4, 5, 90)

    prune(tmp_path, step=5, keep_last=2, best=paths[1].name)

    # 90 is of a run that went further and broke; it goes once this run is there
    assert checkpoints_in(tmp_path) == [paths[5], paths[4], paths[3], paths[1]]


def test_where_a_run_starts(tmp_path: Path) -> None:
    folder, (other,) = tmp_path / "checkpoints", write(tmp_path / "other", 7)
    assert where_to_start(folder, "auto") is where_to_start(folder, "never") is None
    assert where_to_start(folder, str(other)) == other
    with pytest.raises(UserError, match=r"resume=.*no\.ckpt: no such checkpoint"):
        where_to_start(folder, str(tmp_path / "no.ckpt"))

    first, second = write(folder, 1, 2)
    assert where_to_start(folder, "auto") == where_to_start(folder, str(other)) == second
    with pytest.raises(UserError, match=r"resume=never, but .*another name="):
        where_to_start(folder, "never")

    damage(second)
    assert where_to_start(folder, "auto") == first
    damage(first)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is whole"):
        where_to_start(folder, "auto")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write_checkpoint(tmp_path / "other.ckpt", {"weight": torch.zeros(1)})
    (tmp_path / "torn.ckpt").write_bytes(b"PK")
    for name, message in (
        ("no.ckpt", r"no such checkpoint.* step_00000001\.ckpt"),
        ("other.ckpt", " is not a checkpoint of a training"),
        ("torn.ckpt", " is not a checkpoint of a training"),
    ):
        with pytest.raises(UserError, match=f"{name}:?.*{message}"):
            read_checkpoint(tmp_path / name)


def test_a_moved_run_is_extended_from_before_a_broken_checkpoint_and_no_row_is_lost(
    train_in: Run, half_done: Path, six: Path, first_four: Path, world: World, tmp_path: Path, caplog: Any
) -> None:
    """The run, its data and its base are in other places; it was killed between a checkpoint and its row in the log."""
    broken, log = last_checkpoint(half_done), half_done / "log.csv"
    damage(broken)
    for name in ("checkpoints/.step_00000005.ckpt.99.tmp", ".adapter.safetensors.98.tmp", "previews/.x.png.7.tmp"):
        (half_done / name).write_bytes(b"PK")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    before, moved = rows(half_done), {"data.train": world.train, "base.path": world.base}
    for name, place in moved.items():
        shutil.copytree(place, tmp_path / name)

    train_in(half_done, *SIX, *(f"{name}={tmp_path / name}" for name in moved))

    assert f"{broken} is skipped: it is damaged" in caplog.text
    assert list(half_done.rglob("*.tmp")) == [] and rows(half_done)[:1] == before
    assert_same_run(half_done, six)
    clocks = ("train/samples_per_s", "train/step_s", "train/data_wait_s")
    known = [name for name in rows(six)[1] if name not in clocks]
    assert [rows(half_done)[1].get(name) for name in known] == [rows(six)[1][name] for name in known]
    assert saved_configuration(half_done).trainer.max_steps == 6
    assert str(first_four) not in (half_done / "config.yaml").read_text()


def test_a_run_starts_from_the_checkpoint_of_another(
    train_in: Run, tmp_path: Path, first_four: Path, six: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in first_four.rglob("*")}
    begin = f"resume={last_checkpoint(first_four)}"

    second = train_in(tmp_path / "second", *SIX, begin)

    assert {path: path.stat().st_mtime_ns for path in first_four.rglob("*")} == before
    assert column(second, "train/loss") == {k: v for k, v in column(six, "train/loss").items() if k > 4}
    torch.testing.assert_close(checkpoint(second)["state_dict"], checkpoint(six)["state_dict"], rtol=0, atol=0)


@pytest.mark.slow
def test_ranks_that_see_different_checkpoints_are_refused(train_in: Run, world: World, tmp_path: Path) -> None:
    """The run's folder is on the disk of one machine, and its ranks would resume alone."""
    ranks = ("trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={WORLD}", "trainer.precision=32-true")
    common = [*world.overrides(), "~logger.wandb", *ranks, *QUIET, "trainer.max_steps=4"]
    folders = [tmp_path / "x", tmp_path / "y"]
    train_in(folders[0], *QUIET, "trainer.max_steps=2")

    together(train_of_ranks, folders, [common] * WORLD)

    for rank, folder in enumerate(folders):
        end = (tmp_path / f"end_{rank}").read_text()
        assert f"see different checkpoints in {folder}" in end
        assert "rank 0 resumes from step 2, rank 1 from step 0" in end
