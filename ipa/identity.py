"""The folder of a run: named by the user, or unique, and the same for all processes of a run and after a restart."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from ipa.errors import UserError, brief

INTERACTIVE = ("interactive", "bash")  # names of Slurm jobs that are interactive shells
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DIGITS = 6  # of a command's hash
# set by Lightning, srun, jsrun and mpirun; torchrun's RANK counts alone, since it may give a node another number
RANKS = ("NODE_RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK")


def run_folder(parent: str, name: Any, overrides: Sequence[str]) -> Path:
    """``parent/name``, created and writable; ``name`` None chooses one.

    Slurm's job (with a hash of the command, since a job may start several) and torchrun's ``--rdzv-id`` name the same
    folder after a restart. Otherwise the name is the time, and the folder is new. Raises UserError for a name that is
    not a folder's, and for a folder that cannot be written.
    """
    given = text_of(name, overrides)
    group = group_name(os.environ, overrides) if given is None else given
    if group is not None and (group.strip() in ("", ".", "..") or "/" in group or "\0" in group):
        raise UserError(f"name={group}: give the name of a folder in {parent}, without / in it, or no name=")
    try:
        folder = new_folder(Path(parent), datetime.now()) if group is None else Path(parent, group)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the run's folder cannot be created ({brief(error)}): give another paths.runs=FOLDER"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"the run's folder {folder} is read-only: give another paths.runs=FOLDER, or name=NAME")
    return folder


def text_of(name: Any, overrides: Sequence[str]) -> str | None:
    """A name as it was typed: Hydra reads 1e5 and 007 as numbers."""
    if name is None or isinstance(name, str):
        return name
    typed = [override.partition("=")[2] for override in overrides if override.lstrip("+").startswith("name=")]
    return typed[-1] if typed else str(name)


def new_folder(parent: Path, now: datetime) -> Path:
    """Created by this process: of several that start in the same second, each gets its own."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = parent / (now.strftime("%Y-%m-%d_%H-%M-%S") + (f"_{number}" if number > 1 else ""))
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def group_name(environment: Mapping[str, str], overrides: Sequence[str]) -> str | None:
    """The name that all processes of a group agree on, also when they are restarted; None for a process by itself."""
    job = slurm_job(environment)
    if job is not None:
        return f"{job}-{hashlib.sha256(chr(0).join(sorted(overrides)).encode()).hexdigest()[:DIGITS]}"
    if slurm_tasks(environment) > 1:  # srun in an interactive shell
        return f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
    return torchrun_group(environment)


def is_first_process(environment: Mapping[str, str]) -> bool:
    """Whether this is rank 0, asked before the processes know each other."""
    names = ["RANK"] if "RANK" in environment else RANKS
    return all(environment.get(name, "0") == "0" for name in names)


def slurm_tasks(environment: Mapping[str, str]) -> int:
    """Number of tasks that srun started together with this process; 1 in a shell, whatever its allocation is."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", 1))


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """The id of a batch job (of an array: job_task); None in an interactive shell, which is never requeued."""
    if environment.get("SLURM_JOB_NAME") in INTERACTIVE or has_terminal():
        return None
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def has_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def torchrun_group(environment: Mapping[str, str]) -> str | None:
    """The group's id; of the random UUID of ``--standalone``, the first 8 characters."""
    name = torchrun_id(environment)
    if name is None and "TORCHELASTIC_RUN_ID" in environment:
        raise UserError(
            "all processes of torchrun, also after a restart, must use the same run name: give name=NAME, or start "
            "torchrun with --rdzv-id=ID"
        )
    return f"torchrun-{name[:8]}" if name and UUID.fullmatch(name) else name


def torchrun_id(environment: Mapping[str, str]) -> str | None:
    """The id of a group of processes, which a restarted group keeps; torchrun's default is no id."""
    name = environment.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name
