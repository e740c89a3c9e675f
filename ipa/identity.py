"""The default name of a run: the same in all of its processes, and after a restart.

Imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

from ipa.errors import UserError

INTERACTIVE = ("interactive", "bash")  # names of Slurm jobs that are interactive shells


def run_name(environment: Mapping[str, str], now: datetime) -> str:
    """Slurm's job id (of an array: job_task), torchrun's ``--rdzv-id``, or the time.

    A requeued job and a restarted group of processes keep their id. Raises UserError for a group without an id.
    """
    return slurm_job(environment) or torchrun_group(environment) or now.strftime("%Y-%m-%d_%H-%M-%S")


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """The id of a batch job; None in an interactive shell, because several runs can be started from it."""
    if environment.get("SLURM_JOB_NAME") in INTERACTIVE:
        return None
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def torchrun_group(environment: Mapping[str, str]) -> str | None:
    """The group's id; of the random UUID of ``--standalone``, the first 8 characters."""
    name = environment.get("TORCHELASTIC_RUN_ID")
    if name == "none":
        raise UserError(
            "all processes of torchrun, also after a restart, must use the same run name: give name=NAME, or start "
            "torchrun with --rdzv-id=ID"
        )
    return f"torchrun-{name[:8]}" if name and is_uuid(name) else name


def is_uuid(name: str) -> bool:
    try:
        UUID(name)
    except ValueError:
        return False
    return True
