"""The figures and the picture of docs/pairs.md: what carries over is decided by which pictures make a pair.

    python demo/pair_kinds.py train       # three kinds of pairs, three seeds each: half an hour on two cores, resumable
    python demo/pair_kinds.py measure     # 100 held-out image prompts, alone and with the text of another concept
    python demo/pair_kinds.py publish     # copies the adapters of the first seed to demo/adapters/

Run i measures with its own seed of noise. A concept is right if the judge ranks its caption first, or among the first
five, of 100 captions: the image prompt's own, or with a text that of the text. Style and background: as in combine.py.
"""

from __future__ import annotations

import argparse
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
from measure import Prompts, nearest_colour, one_caption_per_concept, pooled
from torch import Tensor
from tqdm import tqdm
from world import HERE

from ipa.export.loading import load_model
from ipa.files import write_atomically
from ipa.metrics.clip import load_scorer
from ipa.metrics.clip_scores import caption_ranks
from ipa.training.previews import draw_grid

ROOT = HERE.parent
RUNS, BUILD = ROOT / "runs", HERE / "build" / "pairs"
PICTURE = ROOT / "docs" / "images" / "pairs.png"
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
SWEEP = ("hydra.launcher.jobs=2", "preview.every_n_steps=1200", "preview.num_scored=1", "~logger.wandb")
ASKED = ("style", "concept, first", "concept, first five", "background")
WAYS = ("image alone", "with a text")


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


def measure_run(kind: str, seed: int) -> Path:
    """Shares of the 100 images, with some of the images; kept, since it takes a minute."""
    torch.set_num_threads(1)
    path, adapter = BUILD / f"{kind}_{seed}.pt", adapter_of(kind, seed)
    if path.is_file() and path.stat().st_mtime > adapter.stat().st_mtime:
        return path
    prompts, texts = Prompts(load_model(adapter)), one_caption_per_concept()
    how = argparse.Namespace(steps=20, guidance=3.0, guidance_rescale=0.0)
    found: dict[str, dict[str, float]] = {}
    shown = []
    for way, asked, given in zip(WAYS, (prompts.captions, texts), ([""] * COUNT, texts), strict=True):
        pixels = prompts.draw(how, 1.0, given, seed)
        found[way] = shares(prompts, pixels, asked)
        shown.append(pixels[:SHOWN])
    write_atomically(path, lambda file: torch.save({"shares": found, "shown": torch.stack(shown)}, file))
    return path


def shares(prompts: Prompts, pixels: Tensor, captions: list[str]) -> dict[str, float]:
    """In per cent: style and background of the image prompt, and the concept of ``captions``."""
    judge = load_scorer(JUDGE)
    told = style_probe().predict(pooled(judge, pixels).numpy())
    ranks = caption_ranks(judge.embed_images(pixels), judge.embed_texts(captions))
    right = {
        "style": torch.tensor([one == other for one, other in zip(told, prompts.styles, strict=True)]),
        "concept, first": ranks < 1,
        "concept, first five": ranks < 5,
        "background": nearest_colour(pixels) == nearest_colour(prompts.pixels),
    }
    return {name: 100 * float(hit.float().mean()) for name, hit in right.items()}


def measure() -> int:
    jobs = [(kind, seed) for kind in OPTIONS for seed in SEEDS]
    with ProcessPoolExecutor(2) as pool:
        made = list(tqdm(pool.map(measure_run, *zip(*jobs, strict=True)), total=len(jobs), unit="run"))
    results = {job: torch.load(path, weights_only=True) for job, path in zip(jobs, made, strict=True)}
    figures = {
        kind: {way: {name: [results[kind, s]["shares"][way][name] for s in SEEDS] for name in ASKED} for way in WAYS}
        for kind in OPTIONS
    }
    write_atomically(BUILD / "figures.json", lambda file: file.write_text(json.dumps(figures, indent=2) + "\n"))
    for way in WAYS:
        print(f"\n| {way} | {' | '.join(ASKED)} |\n|---|{'---|' * len(ASKED)}")
        for kind in OPTIONS:
            print(f"| {kind.replace('_', ' ')} | {' | '.join(spread(figures[kind][way][name]) for name in ASKED)} |")
    draw({kind: results[kind, SEEDS[0]]["shown"] for kind in OPTIONS})
    return 0


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.0f} ± {statistics.stdev(values):.0f}"


def draw(shown: dict[str, Tensor]) -> None:
    """The first prompts; a column for each kind of pairs, without text and with it."""
    prompts = Prompts(load_model(adapter_of("self_pairs", SEEDS[0])))
    columns, titles = [prompts.pixels[:SHOWN]], ["image prompt"]
    for number, ending in enumerate(("", " + text")):
        for kind, pixels in shown.items():
            columns.append(pixels[number])
            titles.append(kind.removesuffix("_pairs") + ending)
    write_atomically(PICTURE, lambda file: draw_grid(columns, titles).save(file, format="PNG", optimize=True))
    print(f"\nwrote {PICTURE}; texts: {', '.join(one_caption_per_concept()[:SHOWN])}")


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
