"""A sweep of real runs: the same command with the same name goes on with what is not finished."""

import re
from pathlib import Path

import pytest
from conftest import Command, column, saved_configuration
from wandb_records import read_offline_runs

SWEEP = ("seed=1,2", "data.val=null", "scoring=null", "trainer.max_steps=2", "-m")


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "checkpoints" in path.parts}


@pytest.mark.slow
def test_a_sweep_resumes_where_it_stopped(start: Command, tmp_path: Path) -> None:
    """One job fails, the other ends; the second command leaves the finished one and makes up for the other."""
    first, second = (tmp_path / "runs/x" / name for name in ("seed1", "seed2"))
    second.mkdir(parents=True)
    (second / "checkpoints").touch()  # no folder can be made here

    output, _ = (process := start(*SWEEP)).communicate(timeout=300)
    assert process.returncode == 1, output
    assert re.search(r"seed1 +done\n.*seed2 +failed with exit code 1, see .*runs/x/seed2/train.log", output), output
    before = files(first)
    assert before

    (second / "checkpoints").unlink()
    output, _ = (process := start(*SWEEP)).communicate(timeout=300)
    assert process.returncode == 0, output
    assert "seed1 is finished" in output
    assert files(first) == before
    assert column(first, "train/loss").keys() == column(second, "train/loss").keys() == {1, 2}
    assert column(first, "train/loss") != column(second, "train/loss")
    assert (second / "adapter.safetensors").is_file()
    assert [saved_configuration(folder).group for folder in (first, second)] == ["x", "x"]
    [one], [failed, other] = (read_offline_runs(folder) for folder in (first, second))
    assert [(run.group, run.name) for run in (one, other)] == [("x", "x/seed1"), ("x", "x/seed2")]
    assert one.id != other.id == failed.id
    assert list(one.curve("train/loss")) == list(other.curve("train/loss")) == [1, 2]
