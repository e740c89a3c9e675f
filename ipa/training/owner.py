"""One process at a time trains in a run's folder: it is named in ``RUN/lock``.

    lock          the first owner
    lock.TOKEN    who took over from the owner with this token, which was gone

Files are created whole and exclusively (a hard link, atomic on NFS too), so one process wins each takeover. An owner is
gone if no process has its pid and start time on its machine. The winner then renames its file to ``lock``. Files that
no chain from ``lock`` reaches are ignored. (``flock`` would be simpler, but many NFS mounts lack it.)
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from uuid import uuid4

from ipa.errors import UserError, brief
from ipa.identity import is_first_process, torchrun_id

LOCK = "lock"
UNREADABLE_S = 2.0  # where links do not work, a lock is empty for a moment
BOOT, NAMESPACE, MACHINE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid"), Path("/etc/machine-id")


@dataclass(frozen=True)
class Owner:
    """A process that trains, and what it is recognised by."""

    token: str
    pid: int
    started: str  # in ticks since the boot: pids are reused
    host: str
    machine: str
    boot: str
    pids: str  # the namespace of pids: a container has its own
    torchrun: str  # id of the group
    job: str  # of Slurm
    restarts: int  # of that job
    since: str

    @classmethod
    def this_process(cls, environment: Mapping[str, str]) -> Owner:
        return cls(
            token=uuid4().hex,
            pid=os.getpid(),
            started=start_of(os.getpid()) or "",
            host=platform.node(),
            machine=text_in(MACHINE),
            boot=text_in(BOOT),
            pids=os.readlink(NAMESPACE) if NAMESPACE.exists() else "",
            torchrun=torchrun_id(environment) or "",
            job=environment.get("SLURM_JOB_ID", ""),
            restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def is_gone(self, me: Owner) -> bool | None:
        """Whether this owner's process has ended; None if ``me`` cannot know."""
        if (self.host, self.machine) == (me.host, me.machine):
            if self.boot == me.boot and self.pids == me.pids:
                start = start_of(self.pid)
                return start is None or "" != start != self.started
            if self.boot != me.boot and self.machine:  # containers of one name on two machines may have no machine-id
                return True
        # Slurm and torchrun start a job or a group again when its processes have ended, maybe on another machine
        requeued = self.job == me.job != "" and me.restarts > self.restarts
        restarted = self.torchrun == me.torchrun if me.torchrun else requeued
        return restarted or None


def text_in(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def start_of(pid: int) -> str | None:
    """Start time of a process; empty if the system does not give it; None if the process is gone or a zombie."""
    try:
        os.kill(pid, 0)
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (ProcessLookupError, IndexError):
        return None
    except OSError:  # another user's process, or no /proc
        return ""


@contextmanager
def owning(folder: Path, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Own ``folder`` while inside; raises UserError if another process does, or may. Rank 0 owns it for its group."""
    if not is_first_process(environment):
        yield
        return
    me = take(folder, environment)
    try:
        yield
    finally:
        with suppress(OSError, UserError):  # how the training ended counts, not the lock
            if owners(folder) == [me]:
                (folder / LOCK).unlink()


def take(folder: Path, environment: Mapping[str, str]) -> Owner:
    me = Owner.this_process(environment)
    while True:
        before = owners(folder)
        if before:
            check_gone(before[-1], me, folder)
        mine = folder / (f"{LOCK}.{before[-1].token}" if before else LOCK)
        if not create(mine, me):
            continue
        if owners(folder)[-1:] == [me]:
            break
        mine.unlink(missing_ok=True)  # another process has taken over and renamed since ``before``
    mine.replace(folder / LOCK)
    for path in [*folder.glob(f"{LOCK}.*"), *folder.glob(f".{LOCK}.*.tmp")]:  # of processes that were killed
        path.unlink(missing_ok=True)
    return me


def owners(folder: Path) -> list[Owner]:
    """The owner, after those from whom it took over while it has not renamed its file."""
    chain: list[Owner] = []
    path = folder / LOCK
    while (owner := read(path)) is not None:
        chain.append(owner)
        path = folder / f"{LOCK}.{owner.token}"
    return chain


def read(path: Path) -> Owner | None:
    deadline = time.monotonic() + UNREADABLE_S
    while True:
        try:
            return checked(Owner(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            if isinstance(error, FileNotFoundError) and not path.is_symlink():
                return None
            if time.monotonic() > deadline:
                raise UserError(
                    f"{path} cannot be read ({brief(error)}): if no process trains there, remove it, then run the same "
                    "command"
                ) from error
            time.sleep(UNREADABLE_S / 20)


def checked(owner: Owner) -> Owner:
    """Raises ValueError for what no process wrote."""
    for field in fields(Owner):
        if type(getattr(owner, field.name)).__name__ != field.type:
            raise ValueError(f"{field.name} is {getattr(owner, field.name)!r}")
    if not (0 < owner.pid < 2**31 and owner.token.isalnum()):
        raise ValueError(f"pid {owner.pid}, token {owner.token!r}")
    return owner


def create(path: Path, me: Owner) -> bool:
    """Whether the file was created; False if another process was first."""
    text, temporary = json.dumps(asdict(me), indent=1), path.with_name(f".{LOCK}.{me.token}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        try:
            os.link(temporary, path)
        except (FileExistsError, FileNotFoundError):  # FileNotFoundError: an owner removed the temporary file
            # NFS may have made the link and lost the answer
            return temporary.exists() and temporary.stat().st_nlink == 2
        except OSError:  # a file system without links
            with path.open("x") as file:
                file.write(text)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"could not write {path} ({brief(error)}): free some space or choose another name=") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def check_gone(owner: Owner, me: Owner, folder: Path) -> None:
    """Raise UserError unless ``me`` may take over."""
    gone = owner.is_gone(me)
    if gone:
        return
    who = f"process {owner.pid} on {owner.host}, since {owner.since}"
    if gone is None:
        raise UserError(
            f"{folder} belongs to {who}, and this machine ({me.host}) cannot see whether that still runs. If it does "
            f"not, remove {folder / LOCK}, then run the same command; otherwise give another name="
        )
    raise UserError(f"{folder} belongs to a training that runs: {who}. Wait for it, stop it, or give another name=")
