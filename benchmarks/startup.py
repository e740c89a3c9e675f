"""How long `train.py` takes to its first step, and which packages it imports without using them.

    python benchmarks/startup.py                  # two minutes on two CPU cores; writes startup.md and startup.json

Every measurement is a process of its own, with the files in the system's cache. The libraries' own imports are made
first, then `train.py` runs as ever, and a callback ends it after the first step; see first_step.py. In one more process
each, Python tells what every import costs, and the profiler whose functions run once everything is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from first_step import ENDED
from measuring import HERE, Spread, save, table
from tqdm import tqdm

ROOT = HERE.parent
COMMAND = "experiment=decoupled_global"
ANSWERS = {"`train.py --help`": "--help", "`train.py optimzer.lr=1`, mistyped": "optimzer.lr=1"}
OWN = {"ipa", "train", "first_step"}
LEAST_S = 0.01  # of imports, for a line in the table
SITE = re.compile(r"site-packages/([^/.]+)")


def start(code: str, *python: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run ``code`` in a Python that finds this checkout; when it was started, and what it said."""
    path = os.pathsep.join([str(HERE), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "offline"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else all libraries are compiled again in every start
    started = time.time()
    done = subprocess.run(
        [sys.executable, *python, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    return started, done


def first_step(folder: str, *overrides: str, python: Sequence[str] = (), **how: Any) -> tuple[dict[str, Any], str]:
    """What a training tells at the end of its first step, times in seconds from the start; and its standard error."""
    options = [COMMAND, f"paths.runs={folder}", *overrides]
    started, done = start(f"import first_step; first_step.run({options!r}, **{how!r})", *python)
    lines = [line for line in done.stdout.splitlines() if line.startswith(ENDED)]
    if not lines:
        raise RuntimeError(f"the training ended before its first step:\n{done.stdout}\n{done.stderr}")
    told = json.loads(lines[0].removeprefix(ENDED))
    for name in ("imported_s", "end_s"):
        told[name] -= started
    return told, done.stderr


def answer_s(option: str) -> float:
    """Seconds of a process that trains nothing."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "train.py", option], cwd=ROOT, capture_output=True, check=False)
    return time.perf_counter() - started


@dataclass
class Package:
    """What importing a package costs by itself, without what it imports in turn.

    ``brought_by`` is empty where a function imported it rather than a module.
    """

    name: str
    brought_by: str = ""
    modules: int = 0
    seconds: float = 0.0
    used: bool = False


def read_imports(lines: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """Of ``-X importtime``: each module, the nearest one above it of another package, and the module's own seconds.

    A module stands below what it imports, which is indented deeper; they come last one first.
    """
    above: list[tuple[int, str]] = []
    for line in reversed(lines):
        found = re.fullmatch(r"import time:\s+(\d+) \|\s+\d+ \|( +)(\S+)", line)
        if found is None:
            continue
        depth, name = len(found[2]), found[3]
        while above and above[-1][0] >= depth:
            above.pop()
        others = [other for _, other in above if package_of(other) != package_of(name)]
        yield name, others[-1] if others else "", int(found[1]) / 1e6
        above.append((depth, name))


def package_of(module: str) -> str:
    return module.partition(".")[0]


def by_package(imports: Sequence[tuple[str, str, float]]) -> list[Package]:
    """The dearest first; a package is brought by the one that imported its first module."""
    packages: dict[str, Package] = {}
    for name, parent, seconds in reversed(imports):  # as they ended
        package = packages.setdefault(package_of(name), Package(package_of(name)))
        package.modules += 1
        package.seconds += seconds
        package.brought_by = package.brought_by or parent
    return sorted(packages.values(), key=lambda package: -package.seconds)


def used_packages(files: Sequence[str]) -> set[str]:
    """Folders of site-packages, which are packages, of which a function was called."""
    return {found[1] for file in files if (found := SITE.search(file))}


def count_imports(folder: str) -> list[Package]:
    """Third-party packages that a training has imported by its first step, and whether their functions ran."""
    plain, told = first_step(folder, python=("-X", "importtime"), libraries=False)
    packages = by_package(list(read_imports(told.splitlines())))
    preload = Path(folder) / "modules.json"
    preload.write_text(json.dumps([name for name in plain["modules"] if name != "__main__"]))
    profiled, _ = first_step(folder, "data.num_workers=0", preload=str(preload))  # else the workers' part goes unseen
    used = used_packages(profiled["called"])
    for package in packages:
        package.used = package.name in used
    return [package for package in packages if package.name not in OWN | sys.stdlib_module_names]


def measure(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        first_step(folder)  # files are in the system's cache
        runs = [first_step(folder)[0] for _ in tqdm(range(rounds), desc="processes")]
        answers = {name: [answer_s(option) for _ in range(rounds)] for name, option in ANSWERS.items()}
        packages = count_imports(folder)
    return {
        "imported_s": [run["imported_s"] for run in runs],
        "first_step_s": [run["end_s"] - run["imported_s"] for run in runs],
        "answers_s": answers,
        "packages": [asdict(package) for package in packages],
    }


def in_markdown(found: Mapping[str, Any]) -> str:
    times = {
        "process start to the end of the libraries' own imports": found["imported_s"],
        "from there to the end of the first step": found["first_step_s"],
        **found["answers_s"],
    }
    rows = [
        [name, f"{spread.median:.2f}", f"{spread.lowest:.2f} – {spread.highest:.2f}"]
        for name, seconds in times.items()
        for spread in [Spread.of(seconds)]
    ]
    return f"{table(['', 'seconds, median', 'lowest – highest'], rows)}\n\n{packages_in_markdown(found['packages'])}"


def packages_in_markdown(packages: Sequence[Mapping[str, Any]]) -> str:
    total = sum(package["seconds"] for package in packages)
    unused = sum(package["seconds"] for package in packages if not package["used"])
    rows = [
        [p["name"], p["modules"], f"{p['seconds']:.2f}", f"{brought_by(p)}", "yes" if p["used"] else "no"]
        for p in packages
        if p["seconds"] >= LEAST_S
    ]
    heading = (
        f"All imports of other packages by the end of the first step take {total:.2f} s, {unused:.2f} s of it in those "
        "of which no function that is written in Python runs afterwards (numpy has others):"
    )
    return f"{heading}\n\n{table(['package', 'modules', 'seconds', 'brought by', 'used'], rows)}"


def brought_by(package: Mapping[str, Any]) -> str:
    return f"`{package['brought_by']}`" if package["brought_by"] else "a function"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="processes of each kind")
    found = measure(parser.parse_args().rounds)
    save("startup", found, in_markdown(found))


if __name__ == "__main__":
    main()
