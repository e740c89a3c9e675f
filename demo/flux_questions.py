"""The curves of docs/flux.md: what helps an adapter for a FLUX-class base to learn, answered on demo/base_flux.

    python demo/flux_questions.py train      # eight variants, three seeds each: an hour on two cores, resumable
    python demo/flux_questions.py draw       # docs/images/flux.png and a table, from the runs there are

The first variant is `recipe=demo_flux experiment=decoupled_global` with 1,200 steps; every other one differs from it in
one thing. Each run is scored at its end with 100 held-out image prompts, without text, by the independent CLIP.
"""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RUNS, PICTURE = ROOT / "runs", ROOT / "docs" / "images" / "flux.png"
SEEDS, BATCH, BIN = (1, 2, 3), 16, 800
ENDS = 10  # measurements at the start and at the end, of 160 samples each
FREE_LAYOUT = "adapter.layout=ipa"  # for what diffusers does not read
VARIANTS = {
    "recipe=demo_flux": (),
    "base.times.timesteps=logit_normal": (),
    "base.value_std=0.02": (),
    "tokens.num_tokens=16": (FREE_LAYOUT,),
    "base.hosts=all": (FREE_LAYOUT,),
    "experiment=decoupled_fine_grained": (FREE_LAYOUT,),
    "experiment=simple_global": (FREE_LAYOUT,),
    "experiment=simple_fine_grained": (FREE_LAYOUT,),
}
COMMON = (
    "recipe=demo_flux",
    "hydra.launcher.jobs=1",
    "trainer.max_steps=1200",
    "schedule.num_warmup_steps=60",
    "image_prompt_check.every_n_steps=10",
    "preview.every_n_steps=1200",
    "preview.num_scored=1",
    "~logger.wandb",
)
SCORES = {"clip_i": 3, "retrieval_at_1": 2, "border_lab": 1}


def name_of(variant: str) -> str:
    return "flux_" + re.sub(r"\W", "_", variant)


def train() -> int:
    """Two variants at a time, with one thread each; a second call continues."""
    with ThreadPoolExecutor(2) as pool:
        return max(pool.map(sweep, VARIANTS))


def sweep(variant: str) -> int:
    """One variant with all seeds, one after the other; returns the exit status."""
    names = (f"seed={','.join(map(str, SEEDS))}", f"name={name_of(variant)}")
    experiment = () if variant.startswith("experiment=") else ("experiment=decoupled_global",)
    options = (*names, *COMMON, *experiment, *({variant} - {*COMMON}), *VARIANTS[variant])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "train.py", "-m", *options], cwd=ROOT, env=environment).returncode


def runs_of(variant: str) -> list[Path]:
    """Those that have ended."""
    found = sorted((RUNS / name_of(variant)).glob("*-seed*"))
    return [run for run in found if (run / "summary.json").is_file()]


def gaps(run: Path) -> dict[int, float]:
    """Samples seen → `image_prompt/gap`, in per cent."""
    with (run / "log.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("image_prompt/gap")]
    return {int(row["step"]) * BATCH: 100 * float(row["image_prompt/gap"]) for row in rows}


def smoothed(runs: list[dict[int, float]]) -> list[tuple[int, float]]:
    """The mean of all runs in bins of ``BIN`` samples."""
    bins: dict[int, list[float]] = {}
    for samples, gap in (pair for run in runs for pair in run.items()):
        bins.setdefault(-(-samples // BIN) * BIN, []).append(gap)
    return [(samples, statistics.mean(values)) for samples, values in bins.items()]


def scores(run: Path) -> dict[str, float]:
    return json.loads((run / "summary.json").read_text())["scores"]["scale 1"]


def draw() -> int:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, variant in enumerate(VARIANTS):
        if not (runs := runs_of(variant)):
            continue
        curves = [gaps(run) for run in runs]
        style = {"color": f"C{number}", "label": variant, "marker": "o", "markersize": 3}
        for panel in panels if number == 0 else [panels[int(variant.startswith("experiment="))]]:
            panel.plot(*zip(*smoothed(curves), strict=True), **style)
        values = [list(curve.values()) for curve in curves]
        first, last = ([statistics.mean(each[part]) for each in values] for part in (slice(ENDS), slice(-ENDS, None)))
        print(f"| `{variant}` | {spread(first, 1)} | {spread(last, 1)} | ", end="")
        print(" | ".join(spread([scores(run)[name] for run in runs], digits) for name, digits in SCORES.items()), "|")
    for panel in panels:
        panel.axhline(0, color="#63625e", linewidth=0.7)
        panel.set_xlabel("samples")
        panel.legend(fontsize=8)
    panels[0].set_ylabel("image_prompt/gap, %")
    panels[0].set_ylim(top=11)  # room for the legend
    figure.savefig(PICTURE, dpi=110)
    return 0


def spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):,.{digits}f} ± {deviation:.{digits}f}"


def main() -> int:
    commands = {"train": train, "draw": draw}
    if sys.argv[1:] not in [[name] for name in commands]:
        sys.exit(__doc__)
    return commands[sys.argv[1]]()


if __name__ == "__main__":
    sys.exit(main())
