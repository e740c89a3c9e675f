"""The curves of docs/finetuning.md: fine-tune the demo adapter on few pictures of a style that it has never seen.

    python demo/make_style.py                     # the pictures
    python demo/finetune.py train SIZE            # 20, 100 or 500 pictures; the run is runs/finetune/style_SIZE
    python demo/finetune.py draw                  # docs/images/finetuning.png, and a table, from the runs there are

Further arguments of ``train`` are options of train.py.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STYLE, RUNS = ROOT / "demo" / "build" / "style", ROOT / "runs" / "finetune"
SIZES = (20, 100, 500)
OPTIONS = (
    *("experiment=finetune", "recipe=demo", "adapter.init_from=demo/adapters/decoupled_global.safetensors"),
    *("optimizer=adamw", "trainer.max_steps=400", "global_batch_size=8"),
    *("schedule=constant", "schedule.num_warmup_steps=20"),
    *("heldout_check.every_n_steps=20", "heldout_check.num_samples=100", "heldout_check.patience=10"),
    *("image_prompt_check.every_n_steps=5", "preview.every_n_steps=400", "preview.num_scored=0"),
    *("preview.text=null", "scoring=null", "~logger.wandb"),
)


def train(size: str, *options: str) -> int:
    places = (f"data.train={STYLE / size}", f"data.val={ROOT / 'demo' / 'data' / 'unseen'}", f"name=style_{size}")
    return subprocess.run([sys.executable, "train.py", *OPTIONS, *places, *options], cwd=ROOT).returncode


def column(size: int, name: str) -> list[tuple[int, float]]:
    """Steps and values."""
    with (RUNS / f"style_{size}" / "log.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def smooth(points: Sequence[tuple[int, float]], window: int = 10) -> list[tuple[int, float]]:
    """Means of the last ``window`` values, which is what the alarm compares."""
    values = [value for _, value in points]
    return [(points[i][0], sum(values[i - window + 1 : i + 1]) / window) for i in range(window - 1, len(points))]


def draw() -> None:
    from matplotlib.figure import Figure

    there = [size for size in SIZES if (RUNS / f"style_{size}" / "log.csv").is_file()]
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(there), sharey=True, squeeze=False)[0], there, strict=True):
        heldout, training = column(size, "image_prompt/heldout_gap"), smooth(column(size, "image_prompt/gap"))
        axes.plot(*zip(*training, strict=True), color="#eb6834", label="training images (mean of 10)")
        axes.plot(*zip(*heldout, strict=True), color="#2a78d6", marker="o", markersize=3, label="held-out images")
        best = max(heldout, key=lambda point: point[1])
        axes.axvline(best[0], color="#63625e", linestyle="dotted")
        axes.set_title(f"{size} images", fontsize=10)
        axes.set_xlabel("step")
        first, last = heldout[0][1], heldout[-1]
        print(
            f"| {size} | {first:.4f} | {best[1]:.4f} | {best[0]} | {last[1]:.4f} | {training[-1][1]:.4f} | {last[0]} |"
        )
    figure.axes[0].set_ylabel("image_prompt/gap")
    figure.axes[-1].legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "images" / "finetuning.png", dpi=110)


def main() -> None:
    match sys.argv[1:]:
        case ["train", size, *options] if size in map(str, SIZES):
            sys.exit(train(size, *options))
        case ["draw"]:
            draw()
        case _:
            sys.exit(
                f"{__doc__}\nGiven: {' '.join(sys.argv[1:]) or 'nothing'}. SIZE is one of {', '.join(map(str, SIZES))}."
            )


if __name__ == "__main__":
    main()
