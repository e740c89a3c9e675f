"""What the benchmarks share: ways that take turns, the machine in words, and results as a table and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

HERE = Path(__file__).parent
LIBRARIES = ("torch", "torchvision", "lightning", "diffusers", "transformers", "open_clip_torch", "numpy", "pillow")


@dataclass(frozen=True)
class Spread:
    """Of several measurements; a ratio of two ways is made of the rounds in which both took their turn."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def take_turns(ways: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Way → seconds of each of its calls. The ways take turns, so that a disturbance meets all of them."""
    for way in ways.values():
        for _ in range(warm_up):
            way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(rounds), desc="rounds", mininterval=5):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    return seconds


def timed(way: Callable[[], object]) -> float:
    """Seconds until the device has done what ``way`` asks of it."""
    synchronize()
    started = time.perf_counter()
    way()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def times_faster(seconds: Mapping[str, Sequence[float]], name: str, than: str) -> Spread:
    """How many times as fast ``name`` is: ratio of the medians, and of the rounds the lowest and the highest one."""
    each = [slow / fast for slow, fast in zip(seconds[than], seconds[name], strict=True)]
    return Spread(statistics.median(seconds[than]) / statistics.median(seconds[name]), min(each), max(each))


def call(*command: str, **environment: str) -> None:
    """Run one of the project's commands, with these variables as well; raises RuntimeError with its last words."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=HERE.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def environment() -> str:
    """Processor or card, threads, Python and the libraries that decide how fast a step is."""
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return f"{device}; {torch.get_num_threads()} threads; Python {platform.python_version()}, {libraries}"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def save(name: str, found: Mapping[str, Any], markdown: str) -> None:
    """Write ``benchmarks/NAME.json`` and ``NAME.md``, with command, date and environment, and print the second."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    found = {"command": command, "date": time.strftime("%Y-%m-%d"), "environment": environment(), **found}
    text = f"Made by `{command}`, {found['date']}, {found['environment']}.\n\n{markdown}\n"
    (HERE / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    (HERE / f"{name}.md").write_text(text)
    print(text)
