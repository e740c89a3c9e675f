"""Processes that start at random moments and want to own a run's folder; some are killed while they do.

    python tests/training/owners.py FOLDER STARTS

Two to four start within a second, with the same name or without one. Prints as JSON how many owned, were refused and
were killed, and all folders without a name. A lock of the kernel shows whether two ever own a folder together.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ipa.errors import UserError
from ipa.identity import run_folder
from ipa.training.owner import owning

HELD_S = 0.2


def own(folder: Path, draw: random.Random) -> str:
    """How it ended."""
    try:
        with owning(folder), (folder / "witness").open("w") as witness:
            try:
                fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "two owners"
            time.sleep(draw.uniform(0, HELD_S))
            if draw.random() < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
        return "owned"
    except UserError as error:
        return "refused" if "belongs to a training that runs" in str(error) else str(error)


def start(parent: Path, within_s: float, seed: int, outcomes: int) -> int:
    child = os.fork()
    if child == 0:
        draw = random.Random(seed)
        time.sleep(draw.uniform(0, within_s))
        name = "x" if draw.random() < 0.75 else None
        folder = run_folder(str(parent), name, ())
        os.write(outcomes, f"{'' if name else folder.name}\t{own(folder, draw)}\n".encode())
        os._exit(0)
    return child


def rounds(starts: int) -> Iterator[int]:
    while starts > 0:
        size = min(starts, random.randint(2, 4))
        yield size
        starts -= size


def main(parent: Path, starts: int, within_s: float) -> None:
    reader, writer = os.pipe()
    killed = 0
    for size in rounds(starts):
        children = [start(parent, within_s, random.getrandbits(64), writer) for _ in range(size)]
        time.sleep(within_s + HELD_S)  # those that were killed are zombies until here
        killed += sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)
    os.close(writer)
    lines = [line.split("\t") for line in os.fdopen(reader).read().splitlines()]
    began = time.monotonic()
    with owning(parent / "x"):
        waited_s = time.monotonic() - began
    left = [path.name for path in (parent / "x").iterdir()]
    ends = Counter(end for _, end in lines) + Counter(killed=killed)
    print(
        json.dumps({"ends": ends, "unnamed": [name for name, _ in lines if name], "waited_s": waited_s, "left": left})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
