"""The figures and the picture of docs/pairs.md: what carries over is decided by which pictures make a pair.

    python demo/pair_kinds.py train       # three kinds of pairs, three seeds each: an hour on two cores, resumable
    python demo/pair_kinds.py measure     # 100 held-out image prompts, alone and with the text of another concept
    python demo/pair_kinds.py publish     # copies the adapters of the first seed to demo/adapters/

Run i measures with its own seed of noise, 20 steps, guidance 4 rescaled by 0.7. A concept is right if the judge ranks
its caption first of 100 captions: those of the image prompts, or with a text those of the texts. The style is told by
the probe of combine.py, the background is the nearest of twelve.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from combine import COUNT, JUDGE, style_probe
from matplotlib import rc_context
from matplotlib.figure import Figure
from measure import Prompts, captions_of_concepts, nearest_colour, pooled
from torch import Tensor
from tqdm import tqdm
from world import HERE

from ipa.evaluation.report.curves import COLOURS, STYLE
from ipa.export.loading import load_model
from ipa.files import write_atomically
from ipa.metrics.clip import load_scorer
from ipa.metrics.clip_scores import caption_ranks
from ipa.training.previews import draw_grid
from ipa.types import to_uint8, to_unit_range

ROOT = HERE.parent
RUNS, BUILD = ROOT / "runs", HERE / "build" / "pairs"
PICTURE, PLOT = ROOT / "docs" / "images" / "pairs.png", ROOT / "docs" / "images" / "pairs_scale.png"
Figures = dict[str, dict[str, dict[str, list[float]]]]  # kind, draw, measure: a share per seed
SEEDS = (1, 2, 3)
SHOWN = 6  # the first prompts, which nobody chose
OPTIONS = {
    "self_pairs": (),
    "style_pairs": ("data.pairs.by=style",),
    "concept_pairs": (
        *("data.pairs.by=concept", "data.pairs.differ=style"),
        "data.reference_background=${data.background}",
    ),
}
SWEEP = ("hydra.launcher.jobs=2", "preview.every_n_steps=2000", "preview.num_scored=1", "~logger.wandb")
ALONE, WITH_TEXT = "image alone", "with a text"
ASKED = {"image": "concept of the image", "text": "concept of the text", "style": "style", "background": "background"}
SCALES = (0.5, 1.0, 1.5, 2.0)
DRAWS = ((ALONE, 1.0), *((WITH_TEXT, scale) for scale in SCALES))


def train() -> int:
    """Two runs at a time with one thread each; a second call continues."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for kind, options in OPTIONS.items():
        sweep = ("-m", "experiment=decoupled_global", f"seed={','.join(map(str, SEEDS))}", f"name={kind}", *SWEEP)
        if code := subprocess.run([sys.executable, "train.py", *sweep, *options], cwd=ROOT, env=environment).returncode:
            return code
    return 0


def adapter_of(kind: str, seed: int) -> Path:
    return RUNS / kind / f"decoupled_global-seed{seed}" / "adapter.safetensors"


def measure_run(kind: str, seed: int) -> dict[str, dict[str, float]]:
    """The shares of each draw; its 100 images are kept, since they take a minute."""
    torch.set_num_threads(1)
    adapter, texts = adapter_of(kind, seed), captions_of_concepts()
    model = load_model(adapter)
    prompts = Prompts(model)
    how = argparse.Namespace(steps=20, guidance=4.0, guidance_rescale=0.7)
    found = {}
    for way, scale in DRAWS:
        path = images_of(kind, seed, way, scale)
        if not path.is_file() or path.stat().st_mtime < adapter.stat().st_mtime:
            pixels = to_uint8(prompts.draw(how, scale, texts if way == WITH_TEXT else [""] * COUNT, seed))
            write_atomically(path, functools.partial(torch.save, pixels))
        found[f"{way} {scale:g}"] = shares(prompts, to_unit_range(torch.load(path, weights_only=True)), texts)
    return found


def images_of(kind: str, seed: int, way: str, scale: float) -> Path:
    return BUILD / f"{kind}_{seed}" / f"{way.replace(' ', '_')}_{scale:g}.pt"


def shares(prompts: Prompts, pixels: Tensor, texts: list[str]) -> dict[str, float]:
    """Of the images, in per cent."""
    judge = load_scorer(JUDGE)
    told = style_probe().predict(pooled(judge, pixels).numpy())
    images = judge.embed_images(pixels)
    right = {
        "image": caption_ranks(images, judge.embed_texts(prompts.captions)) < 1,
        "text": caption_ranks(images, judge.embed_texts(texts)) < 1,
        "style": torch.tensor([one == other for one, other in zip(told, prompts.styles, strict=True)]),
        "background": nearest_colour(pixels) == nearest_colour(prompts.pixels),
    }
    return {name: 100 * float(hit.float().mean()) for name, hit in right.items()}


def measure() -> int:
    jobs = [(kind, seed) for kind in OPTIONS for seed in SEEDS]
    with ProcessPoolExecutor(2) as pool:
        found = list(tqdm(pool.map(measure_run, *zip(*jobs, strict=True)), total=len(jobs), unit="run"))
    figures = {
        kind: {
            f"{way} {scale:g}": {
                name: [each[f"{way} {scale:g}"][name] for (of, _), each in zip(jobs, found, strict=True) if of == kind]
                for name in ASKED
            }
            for way, scale in DRAWS
        }
        for kind in OPTIONS
    }
    write_atomically(BUILD / "figures.json", lambda file: file.write_text(json.dumps(figures, indent=2) + "\n"))
    for draw in next(iter(figures.values())):
        print(f"\n| λ: {draw} | {' | '.join(ASKED.values())} |\n|---|{'---|' * len(ASKED)}")
        for kind, rows in figures.items():
            print(f"| {kind.replace('_', ' ')} | {' | '.join(spread(rows[draw][name]) for name in ASKED)} |")
    show()
    plot(figures)
    return 0


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.0f} ± {statistics.stdev(values):.0f}"


def show() -> None:
    """The first prompts; a column for each kind of pairs, without text and with it, at λ = 1."""
    prompts = Prompts(load_model(adapter_of("self_pairs", SEEDS[0])))
    columns, titles = [prompts.pixels[:SHOWN]], ["image prompt"]
    for way, ending in ((ALONE, ""), (WITH_TEXT, " + text")):
        for kind in OPTIONS:
            pixels = torch.load(images_of(kind, SEEDS[0], way, 1.0), weights_only=True)
            columns.append(to_unit_range(pixels[:SHOWN]))
            titles.append(kind.removesuffix("_pairs") + ending)
    write_atomically(PICTURE, lambda file: draw_grid(columns, titles).save(file, format="PNG", optimize=True))
    print(f"\nwrote {PICTURE}; texts: {', '.join(captions_of_concepts()[:SHOWN])}")


def plot(figures: Figures) -> None:
    """Style and background against the concept of the text, a point for each λ."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, of_image in zip(figure.subplots(1, 2), ("style", "background"), strict=True):
            for number, (kind, rows) in enumerate(figures.items()):
                points = [rows[f"{WITH_TEXT} {scale:g}"] for scale in SCALES]
                x, y = ([statistics.mean(point[name]) for point in points] for name in ("text", of_image))
                x_err, y_err = ([statistics.stdev(point[name]) for point in points] for name in ("text", of_image))
                title = kind.replace("_", " ")
                axes.errorbar(x, y, y_err, x_err, marker="o", color=COLOURS[number], elinewidth=0.7, label=title)
                for scale, *place in zip(SCALES, x, y, strict=True):
                    axes.annotate(f"{scale:g}", place, textcoords="offset points", xytext=(4, 4), fontsize=8)
            axes.set(xlabel="concept of the text, %", ylabel=f"{of_image} of the image, %")
        axes.legend()
        write_atomically(PLOT, lambda file: figure.savefig(file, format="png", dpi=110))


def publish() -> int:
    for kind in ("style_pairs", "concept_pairs"):
        shutil.copyfile(adapter_of(kind, SEEDS[0]), HERE / "adapters" / f"{kind}.safetensors")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure", "publish"))
    return {"train": train, "measure": measure, "publish": publish}[parser.parse_args().what]()


if __name__ == "__main__":
    sys.exit(main())
