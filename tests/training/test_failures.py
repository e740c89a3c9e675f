"""What goes wrong in a run: dirty data, weights that overflow, full disks; nothing is left half-written."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import QUIET, Command, Run, World, column, last_checkpoint, picture, samples, write_shard

from ipa.errors import UserError
from ipa.training.checkpointing import read_checkpoint
from ipa.training.run import describe


def test_dirty_data_is_skipped_and_counted(train_in: Run, tmp_path: Path, world: World) -> None:
    """A broken tar, broken pictures and a sample without caption, beside good shards; eight steps are one pass."""
    broken = write_shard(tmp_path / "dirty/00000.tar", samples(range(200, 206)))
    content = bytearray(broken.read_bytes())
    middle = content.index(b"000000203.txt")  # the header of the second half's first member
    content[middle : middle + 512] = b"\xff" * 512
    broken.write_bytes(content)
    dirt = [("a.txt", b"a thing"), ("a.png", picture(1)[:60]), ("b.png", picture(2)), ("c.txt", b"c"), ("c.png", b"no")]
    write_shard(tmp_path / "dirty/00001.tar", [*dirt, *samples([300, 301, 302])])

    one_pass = (f"data.train=[{tmp_path}/dirty,{world.train}]", "trainer.max_steps=8", "preview.every_n_steps=8")
    folder = train_in(tmp_path / "x", *QUIET, *one_pass)

    for reason, count in {"broken tar": 1, "broken picture": 2, "no caption": 1}.items():
        counts = [float(value) for value in column(folder, f"data/rejected/{reason}").values()]
        assert counts == sorted(counts)
        assert counts[-1] == count
    assert len(column(folder, "train/loss")) == 8
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["samples rejected"] == 4
    assert "broken picture (2)" in describe(summary) and "broken tar (1)" in describe(summary)


def test_weights_that_overflow_fp16_are_not_saved(train_in: Run, tmp_path: Path) -> None:
    """Finite in fp32, but too large for the fp16 of the adapter file."""
    with pytest.raises(ValueError, match=r"after step 1 .* not finite or too large"):
        train_in(tmp_path / "x", "optimizer.lr=1e6", "preview.every_n_steps=1", "data.val=null", "scoring=null")

    assert not (tmp_path / "x/adapter.safetensors").exists()
    assert not (tmp_path / "x/checkpoints").exists()


FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint", "adapter"])
def test_a_full_disk_leaves_the_last_files(start: Command, train_in: Run, tmp_path: Path, what: str) -> None:
    """A limit on the size of files stands for the full disk: the adapter fits, the checkpoint does not; or neither."""
    two_steps = train_in(tmp_path / "runs/decoupled_global/x", *QUIET, "trainer.max_steps=2")
    last, adapter = last_checkpoint(two_steps), two_steps / "adapter.safetensors"
    contents = {path: path.read_bytes() for path in (last, adapter)}
    limit = len(contents[last]) // 2 if what == "checkpoint" else len(contents[adapter]) - 1000
    assert (what == "checkpoint") == (len(contents[adapter]) < limit)

    process = start(*QUIET, "~logger.wandb", "trainer.max_steps=4", setup=FULL_DISK.format(limit=limit))
    output, _ = process.communicate(timeout=200)

    assert process.returncode == 1, output
    assert "could not write" in output and "free some space" in output
    assert (".ckpt" in output) == (what == "checkpoint")
    assert "Traceback" not in output
    assert last.read_bytes() == contents[last] and read_checkpoint(last)["global_step"] == 2
    assert what == "checkpoint" or adapter.read_bytes() == contents[adapter]
    assert [path.name for path in two_steps.rglob("*.tmp")] == []


def test_a_run_resumes_when_its_full_disk_has_room_again(train_in: Run, small_disk: Path) -> None:
    """A file system that is really full: the run says so, and its last checkpoint is whole."""
    folder = train_in(small_disk / "x", *QUIET, "trainer.max_steps=1")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))

    with pytest.raises(UserError, match=r"could not write .*step_00000002\.ckpt.*No space left.*resume"):
        train_in(folder, *QUIET, "trainer.max_steps=2")

    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000001.ckpt"]
    filler.unlink()
    train_in(folder, *QUIET, "trainer.max_steps=2")
    assert list(column(folder, "train/loss")) == [1, 2]
