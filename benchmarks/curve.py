"""Whether a training with all that makes it faster learns what plain fp32 learns: loss curves of the same run, thrice.

    python benchmarks/curve.py                    # the demo world, 500 steps each, about ten minutes on two CPU cores

The same seed, order, noise and drops: in plain fp32, frozen encoders online, default layout, no compiled blocks; the
same under bf16 autocast, whose rounding is the yardstick; and with all on: frozen weights in bf16, latents and
embeddings from a cache, channels-last, compiled blocks, AdamW in one kernel. Pictures lie on white, since a cache
holds no random backgrounds. Writes docs/images/loss_fast.png beside the figures. On a GPU: --device gpu.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from pathlib import Path
from typing import Any

from measuring import HERE, call, save, table
from tqdm import tqdm

PICTURE = HERE.parent / "docs" / "images" / "loss_fast.png"
FP32, AUTOCAST, FAST = "plain fp32", "plain, bf16 autocast", "all on"
BATCH = 32
WINDOW = 25  # steps, over which a curve is smoothed: single losses swing with their noise levels
PLAIN = {"base.channels_last": False, "optimizer.fused": False, "data.background": "null"}
HALF = {"trainer.precision": "bf16-mixed"}
HALVED = {"base.dtype": "bfloat16", "encoder.dtype": "bfloat16"}


def make_ways(cache: Path) -> dict[str, dict[str, Any]]:
    lanes = {"data.lanes.ranks": 1, "data.lanes.workers": 1, "data.num_workers": 1}
    return {
        FP32: PLAIN,
        AUTOCAST: {**PLAIN, **HALF},
        FAST: {
            "data": "cache",
            "data.train": cache,
            "data.val": "demo/data/heldout",
            **lanes,
            **HALF,
            **HALVED,
            "compile": True,
        },
    }


def train(folder: Path, options: dict[str, Any], steps: int, device: str) -> list[float]:
    """The loss of every step."""
    given = {
        "trainer": device,
        "global_batch_size": BATCH,
        "optimizer": "adamw",
        "trainer.max_steps": steps,
        "trainer.log_every_n_steps": 1,
        "preview.every_n_steps": steps,
        "preview.num_scored": 1,
        "scoring.scorer": "null",
        "hydra.run.dir": folder,
        **options,
    }
    call("train.py", *(f"{name}={value}" for name, value in given.items()))
    with (folder / "log.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def smooth(losses: list[float]) -> list[float]:
    return [sum(losses[i : i + WINDOW]) / WINDOW for i in range(len(losses) - WINDOW + 1)]


def distance(losses: list[float], others: list[float]) -> dict[str, float]:
    """Between two curves: root mean square and largest of the smoothed differences, and the difference of the means."""
    differences = smooth([a - b for a, b in zip(losses, others, strict=True)])
    return {
        "rms": math.sqrt(sum(each**2 for each in differences) / len(differences)),
        "largest": max(map(abs, differences)),
        "mean": (sum(losses) - sum(others)) / len(losses),
    }


def draw(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for name, losses in curves.items():
        steps = range(WINDOW, len(losses) + 1)
        above.plot(steps, smooth(losses), label=name, linewidth=1.2)
        if name != FP32:
            differences = [a - b for a, b in zip(losses, curves[FP32], strict=True)]
            below.plot(steps, smooth(differences), label=f"{name} − {FP32}", linewidth=1.2)
    above.set_ylabel(f"loss, mean of {WINDOW} steps")
    below.set(xlabel="step", ylabel="difference")
    below.axhline(0, color="black", linewidth=0.6)
    above.legend()
    below.legend()
    figure.savefig(path, dpi=110)


def in_markdown(found: dict[str, Any]) -> str:
    rows = [
        [name, f"{each['mean']:+.5f}", f"{each['rms']:.5f}", f"{each['largest']:.5f}"]
        for name, each in found["distances"].items()
    ]
    columns = [f"against {FP32}", "difference of the mean loss", f"rms, {WINDOW} steps' mean", "largest"]
    return f"{found['steps']} steps, mean loss {found['mean_loss']:.4f} in {FP32}.\n\n" + table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    options = parser.parse_args()
    curves = {}
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name) / "cache"
        device = {"cpu": "cpu", "gpu": "cuda"}[options.device]
        given = {"out": cache, "device": device, "data.background": "null", **HALVED}
        call("-m", "ipa.tools.precompute", *(f"{name}={value}" for name, value in given.items()))
        for number, (way, changes) in enumerate(tqdm(make_ways(cache).items(), desc="trainings")):
            curves[way] = train(Path(name) / str(number), changes, options.steps, options.device)
    draw(curves, PICTURE)
    found = {
        "steps": options.steps,
        "mean_loss": sum(curves[FP32]) / options.steps,
        "distances": {way: distance(curves[way], curves[FP32]) for way in (AUTOCAST, FAST)},
        "curves": {way: [round(loss, 5) for loss in losses] for way, losses in curves.items()},
    }
    save("curve", found, in_markdown(found))


if __name__ == "__main__":
    main()
