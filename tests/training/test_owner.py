"""A run's folder has one owner, and no lock outlives its owner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from ipa.errors import UserError
from ipa.training.owner import LOCK, Owner, owning

HERE = Path(__file__).parent
REQUEUED = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
GROUP = {"TORCHELASTIC_RUN_ID": "night"}


@pytest.mark.parametrize(
    ("starts", "within_s"), [(24, 0.02), pytest.param(200, 1.0, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_processes_that_start_together_and_are_killed(tmp_path: Path, starts: int, within_s: float) -> None:
    """Each starts within ``within_s``; half of the owners are killed with SIGKILL."""
    command = [sys.executable, str(HERE / "owners.py"), str(tmp_path), str(starts), str(within_s)]
    environment = {"PYTHONPATH": str(HERE.parents[1])}
    found = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert set(found["ends"]) <= {"owned", "refused", "killed"}
    assert sum(found["ends"].values()) == starts and found["ends"]["owned"] and found["ends"]["killed"]
    assert len(set(found["unnamed"])) == len(found["unnamed"])
    assert found["waited_s"] < 1 and found["left"] == ["witness"]


def owned_by(folder: Path, **changes: Any) -> Path:
    """``folder`` with the lock of a process like this one, but for ``changes``."""
    owner = replace(Owner.this_process({"SLURM_JOB_ID": "7"}), **changes)
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    return folder


def no_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("changes", "environment"),
    [
        (lambda: {"pid": no_process()}, {}),
        (lambda: {"started": "1"}, {}),  # the pid was given to another process
        (lambda: {"boot": "an earlier one"}, {}),
        (lambda: {"host": "other"}, REQUEUED),
        (lambda: {"pids": "a container's"}, REQUEUED),
        (lambda: {"host": "other", "torchrun": "night"}, GROUP),
    ],
    ids=["ended", "pid reused", "rebooted", "requeued", "requeued, container", "torchrun restarted"],
)
def test_an_owner_that_is_gone_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, environment: dict[str, str]
) -> None:
    machine = tmp_path.with_name("machine-id")
    machine.write_text("a machine")
    monkeypatch.setattr("ipa.training.owner.MACHINE", machine)
    folder = owned_by(tmp_path, **changes())
    with owning(folder, environment):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "environment", [{}, {"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, GROUP]
)
def test_an_owner_that_cannot_be_seen_is_reported_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    def assert_reported(**changes: str) -> None:
        folder = owned_by(tmp_path, **changes)
        words = rf"process {os.getpid()} on .* remove {folder}/lock, .*name="
        with pytest.raises(UserError, match=words), owning(folder, environment):
            pass

    for changes in ({"host": "other"}, {"machine": "other"}, {"pids": "a container's"}):
        assert_reported(**changes)
    monkeypatch.setattr("ipa.training.owner.MACHINE", tmp_path / "none")
    if not environment:  # containers of one name: without a machine-id, another boot may be another machine
        assert_reported(boot="another machine's")


DAMAGED: list[Any] = ["", "{", "[]", "[" * 100_000, "null", None]
DAMAGED += [{"pid": "7"}, {"pid": 0}, {"pid": 2**70}, {"token": "../x"}, {"restarts": None}]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: str(content)[:16])
def test_a_lock_that_no_process_wrote_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | dict[str, Any] | None
) -> None:
    """Text, a lock with other values, or a link to nothing."""
    monkeypatch.setattr("ipa.training.owner.UNREADABLE_S", 0.02)
    if content is None:
        (tmp_path / LOCK).symlink_to(tmp_path / "nothing")
    elif isinstance(content, str):
        (tmp_path / LOCK).write_text(content)
    else:
        owned_by(tmp_path, **content)
    with pytest.raises(UserError, match=r"lock cannot be read.*remove it"), owning(tmp_path):
        pass


def test_a_lock_damaged_while_it_is_held_and_file_systems_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with owning(tmp_path, {"SLURM_RESTART_COUNT": ""}):  # what is raised inside would be replaced here
        (tmp_path / LOCK).write_text("{")
    (tmp_path / LOCK).unlink()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links")))
    with owning(tmp_path), pytest.raises(UserError, match="belongs to a training that runs"), owning(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_training_in_a_folder_changes_nothing_there(train_in: Run, finished: Path) -> None:
    with owning(finished):
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
        with pytest.raises(UserError, match=r"belongs to a training that runs: process \d+ on .*name="):
            train_in(finished, "trainer.max_steps=6")
        assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
