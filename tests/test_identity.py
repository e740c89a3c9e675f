"""The folder of a run."""

import re
from pathlib import Path

import pytest

from ipa import identity
from ipa.errors import UserError
from ipa.identity import group_name, is_first_process, run_folder

SLURM = {"SLURM_JOB_ID": "812", "SLURM_JOB_NAME": "train"}
ARRAY = {**SLURM, "SLURM_ARRAY_JOB_ID": "800", "SLURM_ARRAY_TASK_ID": "12"}
SHELL = {**SLURM, "SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "4"}
TASK = {**SHELL, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "3"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(identity, "has_terminal", lambda: False)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        (SLURM, r"812-\w{6}"),
        (ARRAY, r"800_12-\w{6}"),
        (SHELL, None),  # a new folder for each run of a shell
        ({**SHELL, "SLURM_JOB_NAME": "bash"}, None),
        (TASK, r"812\.3"),  # srun in a shell: the same name for all tasks
        ({"TORCHELASTIC_RUN_ID": "night"}, "night"),
        ({"TORCHELASTIC_RUN_ID": "0d3c8a1b-7c7e-4b0e-9d51-3f3e0c7a1f00"}, "torchrun-0d3c8a1b"),
        ({**SLURM, "TORCHELASTIC_RUN_ID": "none"}, r"812-\w{6}"),
    ],
)
def test_processes_of_a_group_agree_on_a_name(environment: dict[str, str], name: str | None) -> None:
    found = group_name(environment, ["seed=1"])
    assert found == name if name is None else re.fullmatch(name, str(found))


def test_runs_of_one_job_have_names_of_their_own_which_a_requeued_job_finds() -> None:
    loop = [group_name(SLURM, [f"seed={seed}", "data.num_workers=2"]) for seed in (1, 2)]
    again = group_name({**SLURM, "SLURM_RESTART_COUNT": "1"}, ["data.num_workers=2", "seed=1"])

    assert loop[0] == again != loop[1]


def test_runs_started_in_a_terminal_are_not_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "has_terminal", lambda: True)
    assert group_name(SLURM, []) is None


def test_a_group_of_processes_without_an_id_is_refused() -> None:
    with pytest.raises(UserError, match=r"name=NAME.*--rdzv-id"):
        group_name({"TORCHELASTIC_RUN_ID": "none"}, [])


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun has its own numbers
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "0"}, False),
    ],
)
def test_one_process_of_a_group_is_the_first(environment: dict[str, str], first: bool) -> None:
    assert is_first_process(environment) is first


def test_runs_without_a_name_never_share_a_folder(tmp_path: Path) -> None:
    folders = [run_folder(str(tmp_path), None, []) for _ in range(3)]

    assert sorted(tmp_path.iterdir()) == sorted(set(folders)) and len(set(folders)) == 3


@pytest.mark.parametrize(
    ("typed", "parsed", "name"),
    [
        ("mine", "mine", "mine"),
        ("1e5", 100000.0, "1e5"),
        ("007", 7, "007"),
        ("true", True, "true"),
        ("'a, b=c'", "a, b=c", "a, b=c"),
        ("ä λ", "ä λ", "ä λ"),
    ],
)
def test_a_name_is_text_as_it_was_typed(tmp_path: Path, typed: str, parsed: object, name: str) -> None:
    assert run_folder(str(tmp_path), parsed, [f"name={typed}"]) == tmp_path / name


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "a/b", "/a", "a\0b"])
def test_a_name_stays_inside_the_experiment(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"name=.*without /"):
        run_folder(str(tmp_path), name, [f"name={name}"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("parent", ["/proc/x", "/dev/null/x", "long" * 100])
def test_an_impossible_folder_is_refused(tmp_path: Path, parent: str) -> None:
    with pytest.raises(UserError, match=r"cannot be created.*paths\.runs="):
        run_folder(str(tmp_path / parent), "x", [])
