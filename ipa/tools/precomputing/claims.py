"""Work on many files, shared by processes and machines that do not talk to each other.

A process claims a file that is to be made with a lock beside it, which the kernel gives back however the process ends.
The file is written beside its name and renamed when it is whole: what has the name is done. Where a file system has no
locks, a share of the files (``rank`` of ``world``) belongs to each process instead.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from ipa.errors import UserError

Item = TypeVar("Item")

# who starts several processes tells them their number and how many there are
STARTERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


def read_share(rank: int | None, world: int | None, environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Which share of the files, of how many, comes first for this process; None when neither is said.

    As given, else as torchrun or Slurm tell. Raises UserError for half of it, or a share that there is not.
    """
    given = (rank, world)
    for names in STARTERS:
        if given == (None, None) and all(name in environment for name in names):
            given = (int(environment[names[0]]), int(environment[names[1]]))
    if given == (None, None):
        return None
    if given[0] is None or given[1] is None or not 0 <= given[0] < given[1]:
        raise UserError(f"rank={given[0]} world={given[1]}: give both or neither, the rank from 0 to world - 1")
    return given[0], given[1]


def in_turn(items: Sequence[Item], rank: int, world: int) -> Iterator[Item]:
    """This share of the items first, then those of the others, in case that they are behind."""
    for turn in range(world):
        yield from items[(rank + turn) % world :: world]


@dataclass
class Claim:
    """The right to make the file ``path``: it is written at ``beside``, then ``finish`` gives it its name."""

    path: Path
    held: IO[bytes] | None = field(default=None, repr=False)

    @property
    def beside(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part")

    def finish(self) -> None:
        os.replace(self.beside, self.path)
        tidy(self.path)
        self.drop()

    def drop(self) -> None:
        """Give up the claim; closing the file unlocks it."""
        if self.held is not None:
            self.held.close()


def lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def tidy(path: Path) -> None:
    """Remove the lock of a file that is done: whoever locks it still, or anew, finds the file."""
    lock_of(path).unlink(missing_ok=True)


@dataclass
class Claims:
    """Gives claims to this process. ``share`` is its own of the files, with which it can do without locks."""

    share: tuple[int, int] | None = None
    locking: bool = True

    def order(self, items: Sequence[Item]) -> Iterator[Item]:
        """What to try to claim; the others' shares come last, and not at all without locks."""
        rank, world = self.share or (0, 1)
        for number, item in enumerate(in_turn(items, rank, world)):
            if not self.locking and number >= len(items[rank::world]):
                return
            yield item

    def claim(self, path: Path) -> Claim | None:
        """None when another process has it. Raises UserError with the advice where nothing can be locked.

        The file may have been finished a moment before: look again whether it is there.
        """
        if not self.locking:
            return Claim(path)
        held = lock_of(path).open("wb")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Claim(path, held)
        except OSError as error:
            held.close()
            if isinstance(error, BlockingIOError):
                return None
            self.do_without(path, error)
            return Claim(path)

    def do_without(self, path: Path, error: OSError) -> None:
        """The file system refuses locks: that is well where each process has files of its own."""
        if error.errno not in NO_LOCKS:
            raise error
        tidy(path)
        if self.share is None:
            raise UserError(
                f"{path.parent}: this file system refuses locks ({error.strerror}), which keep processes from "
                "making the same file. Give rank=0 world=1 if this is the only one; of several, each its own rank=."
            ) from error
        self.locking = False
