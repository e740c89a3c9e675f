"""The name of a run that was not given one: the same for all its processes, and again when it is started anew.

Imports only the standard library, as `ipa.cli` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

from ipa.errors import UserError

INTERACTIVE = ("interactive", "bash")  # names of Slurm jobs that are a user's shell


def run_name(environment: Mapping[str, str], now: datetime) -> str:
    """Slurm's job id (of an array: job_task), torchrun's ``--rdzv-id``, or the time.

    A requeued job and a restarted group keep theirs. Raises UserError for a group that has none.
    """
    return slurm_job(environment) or torchrun_group(environment) or now.strftime("%Y-%m-%d_%H-%M-%S")


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """Of a batch job. Several runs may be started from a shell, so its id is none of theirs."""
    if environment.get("SLURM_JOB_NAME") in INTERACTIVE:
        return None
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def torchrun_group(environment: Mapping[str, str]) -> str | None:
    """``--standalone`` draws a long id, of which a part will do."""
    name = environment.get("TORCHELASTIC_RUN_ID")
    if name == "none":
        raise UserError(
            "the processes of torchrun, and those that it starts anew after a fault, find each other's run by its "
            "name: give name=NAME, or torchrun an --rdzv-id"
        )
    return f"torchrun-{name[:8]}" if name and is_uuid(name) else name


def is_uuid(name: str) -> bool:
    try:
        UUID(name)
    except ValueError:
        return False
    return True
