"""Whether a step of `train.py` costs the same with many shards, with every row of log, and between previews.

    python benchmarks/loop.py                     # the demo world, about ten minutes on two CPU cores

Runs of `train.py` take turns, each in a process of its own with the clock below, and differ in one option from the
plain one. A step lasts from the end of the one before to its own, with its wait for data and all callbacks; those
that draw previews or write a checkpoint are told apart. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
from measuring import HERE, Spread, call, save, table
from tqdm import tqdm

DATA = HERE.parent / "demo" / "data" / "train"
PLAIN = "4 shards, a row of log in 50 steps, no previews"
SHARDS = 4000
WARM_UP = 10  # steps, in which memory is allocated and the data workers come into swing
EVERY = 25
BATCH = 32
NEVER = 100_000
QUIET = {"trainer.log_every_n_steps": 50, "preview.every_n_steps": NEVER, "scoring.scorer": "null"}


class Clock(L.Callback):
    """Writes when each step ended, after what all other callbacks did in it."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_train_end(self, *args: Any) -> None:
        self.path.write_text(json.dumps(self.ends))


def link_shards(folder: Path, count: int) -> Path:
    """A folder of so many shards, under whose names those of the demo world come round."""
    known = sorted(DATA.glob("*.tar"))
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:05d}.tar").symlink_to(known[number % len(known)])
    return folder


def make_ways(folder: Path) -> dict[str, dict[str, Any]]:
    """Name → options that differ from those of the plain way."""
    return {
        PLAIN: {},
        f"{SHARDS:,} shards": {"data.train": link_shards(folder / "shards", SHARDS)},
        "a row of log every step": {"trainer.log_every_n_steps": 1},
        f"a checkpoint every {EVERY} steps": {"checkpoint.every_n_steps": EVERY},
        f"previews, checkpoint and adapter every {EVERY} steps": {"preview.every_n_steps": EVERY},
    }


def run(folder: Path, options: dict[str, Any], steps: int) -> list[float]:
    """Seconds of every step but the first ones of a run, which is left in ``folder``."""
    ends = folder / "ends.json"
    given = {
        **QUIET,
        "global_batch_size": BATCH,
        "trainer.max_steps": steps,
        "hydra.run.dir": folder / "run",
        "+callbacks.clock._target_": "loop.Clock",
        "+callbacks.clock.path": ends,
        **options,
    }
    call("train.py", *(f"{name}={value}" for name, value in given.items()), PYTHONPATH=str(HERE))
    times = json.loads(ends.read_text())
    return [after - before for before, after in pairwise(times)]


def sort_steps(seconds: list[float], every: int) -> tuple[list[float], list[float]]:
    """Those between, and every such one. The first is that of step 2: step 1 has no start."""
    numbered = [(number, value) for number, value in enumerate(seconds, 2) if number > WARM_UP]
    between = [value for number, value in numbered if number % every]
    return between, [value for number, value in numbered if not number % every]


def compare(ways: dict[str, dict[str, Any]], folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Way → seconds of a step between previews and checkpoints (median of each run), and of those with one."""
    found: dict[str, Any] = {name: {"between_s": [], "own_s": []} for name in ways}
    with tqdm(total=rounds * len(ways), desc="runs") as bar:
        for number in range(rounds):
            for place, (name, options) in enumerate(ways.items()):
                seconds = run(folder / f"{number}-{place}", options, steps)
                between, own = sort_steps(seconds, EVERY if EVERY in options.values() else NEVER)
                found[name]["between_s"].append(median(between))
                found[name]["own_s"] += own
                bar.update()
    return found


def ratio(found: dict[str, Any], name: str) -> Spread:
    """How many times as long a step takes as in the plain run of the same round."""
    pairs = zip(found[name]["between_s"], found[PLAIN]["between_s"], strict=True)
    return Spread.of([mine / plain for mine, plain in pairs])


def in_markdown(found: dict[str, Any]) -> str:
    ways, rows = found["ways"], []
    for name, each in ways.items():
        spread = ratio(ways, name)
        own = f"{1000 * median(each['own_s']):.0f}" if each["own_s"] else ""
        rows.append(
            [
                name,
                f"{1000 * median(each['between_s']):.1f}",
                f"{spread.median:.3f}",
                f"{spread.lowest:.3f} – {spread.highest:.3f}",
                own,
            ]
        )
    columns = ["run", "ms per step", "× plain", "lowest – highest", "ms of a step with them"]
    return f"{found['rounds']} runs of {found['steps']} steps each, in turns; the median step of each run.\n\n" + table(
        columns, rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=110)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ways = compare(make_ways(Path(name)), Path(name), options.rounds, options.steps)
    found = {
        "rounds": options.rounds,
        "steps": options.steps,
        "ways": ways,
        "ratios": {each: asdict(ratio(ways, each)) for each in ways},
    }
    save("loop", found, in_markdown(found))


if __name__ == "__main__":
    main()
