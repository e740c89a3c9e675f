"""Measure the demo world: the figures of demo/README.md, and the picture grids.

    python demo/measure.py clip               # probes and retrieval of encoder and judge
    python demo/measure.py clip --models DIR  # the same of those in DIR, figures in DIR/figures.json
    python demo/measure.py vae                # dB on held-out pictures, against the patch PCA
    python demo/measure.py base               # text only: the judge's rank-1 and rank-5 among 100 captions, and a grid
    python demo/measure.py base --base DIR --key NAME   # the same of another base, without the grid
    python demo/measure.py adapter RUN        # or a file: 100 held-out image prompts, alone and with a text; a grid
    python demo/measure.py curves             # losses of the trainings in demo/build as a picture

Each prints its figures and keeps them in demo/figures.json unless said otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from make_base import load_pca
from make_clip import RECIPES, clip_tokenizer, make_model
from PIL import Image
from torch import Tensor
from world import (
    COLOURS,
    HERE,
    SIZE_PX,
    STYLE_WORDS,
    World,
    compose,
    describe,
    draw_backgrounds,
    positive_int,
    read_world,
)

sys.path.insert(0, str(HERE.parent))

from ipa.errors import UserError
from ipa.metrics.border import BorderColour, border_lab, rgb_to_lab
from ipa.metrics.clip import ClipScorer
from ipa.metrics.clip_scores import ClipCosines, caption_ranks
from ipa.types import Features, to_uint8

FIGURES = HERE / "figures.json"
IMAGES = HERE.parent / "docs" / "images"
COUNT = 100


def keep(name: str, figures: dict[str, Any], path: Path = FIGURES) -> None:
    """Print the figures and merge them into the file of all figures."""
    figures = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    print(name, json.dumps(figures, indent=2))
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = figures
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def measure_clip(options: argparse.Namespace) -> None:
    """Linear probes for style and background on concepts that neither probe nor encoder has seen, and text retrieval.

    The probes learn from training concepts and are asked about held-out ones, in all styles and random backgrounds;
    an untrained net of the same shape is the yardstick.
    """
    train, heldout = read_world(HERE / "data" / "train"), read_world(HERE / "build" / "data" / "judge")
    for name in options.names:
        folder = options.models / name
        trained = ClipScorer.from_pretrained(f"local-dir:{folder}")
        torch.manual_seed(0)
        untrained = ClipScorer.from_pretrained(f"local-dir:{folder}")
        untrained.clip.load_state_dict(make_model(RECIPES[name], clip_tokenizer()).state_dict())
        figures = {}
        for state, scorer in (("trained", trained), ("untrained", untrained)):
            found = probe(scorer, train, heldout)
            if "patch_size" in RECIPES[name].vision:
                found |= probe_patches(scorer, train, heldout)
            figures |= {f"{k}, {state}": v for k, v in found.items()}
        figures |= {f"training concepts, {k}": v for k, v in text_retrieval(trained, train).items()}
        figures |= {f"held-out concepts, {k}": v for k, v in text_retrieval(trained, heldout).items()}
        keep(name, figures, options.models / FIGURES.name)


def probe(scorer: ClipScorer, train: World, heldout: World) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(0)
    backgrounds = [torch.randint(len(COLOURS), (len(world),), generator=generator) for world in (train, heldout)]
    x = [pooled(scorer, compose(w.rgba, b)) for w, b in zip((train, heldout), backgrounds, strict=True)]
    labels = {"style": (train.styles, heldout.styles), "background": tuple(b.tolist() for b in backgrounds)}
    accuracies = {}
    for what, (fit, ask) in labels.items():
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[0].numpy(), fit)
        accuracies[f"{what} probe"] = float(classifier.score(x[1].numpy(), ask))
    return accuracies


@torch.no_grad()
def probe_patches(scorer: ClipScorer, train: World, heldout: World) -> dict[str, float]:
    """R² of what a linear map of the patch features before the last layer, which fine-grained heads read, tells.

    Asked of each patch of held-out concepts: its mean colour, and how much of it the thing covers.
    """
    from sklearn.linear_model import LinearRegression
    from sklearn.metrics import r2_score

    visual: Any = scorer.clip.visual
    edge = SIZE_PX // visual.grid_size[0]
    taken: list[Tensor] = []
    hook = visual.transformer.resblocks[-2].register_forward_hook(lambda _, __, out_BLD: taken.append(out_BLD[:, 1:]))
    generator = torch.Generator().manual_seed(0)
    x, y = [], []
    for world in (train, heldout):
        pixels = compose(world.rgba, draw_backgrounds(len(world), generator))
        pooled(scorer, pixels)
        x.append(torch.cat(taken).flatten(0, 1).numpy())
        taken.clear()
        colour_and_cover = torch.cat([pixels, world.rgba[:, 3:] / 255], 1)
        y.append(F.avg_pool2d(colour_and_cover, edge).flatten(2).transpose(1, 2).flatten(0, 1).numpy())
    hook.remove()
    told = LinearRegression().fit(x[0], y[0]).predict(x[1])
    scores = r2_score(y[1], told, multioutput="raw_values")
    return {"patch colour R2": float(scores[:3].mean()), "patch cover R2": float(scores[3])}


@torch.no_grad()
def pooled(scorer: ClipScorer, pixels_B3HW: Tensor) -> Tensor:
    """Embeddings as an adapter reads them, not normalised."""
    normalized = ((pixels_B3HW + 1) / 2 - scorer.mean) / scorer.std
    return torch.cat([scorer.clip.encode_image(piece) for piece in normalized.split(64)])


def text_retrieval(scorer: ClipScorer, world: World) -> dict[str, float]:
    """Share of 100 real pictures whose plain caption is the nearest, or among the nearest five, of the 100."""
    rows = one_per_concept(world)[:COUNT]
    generator = torch.Generator().manual_seed(0)
    pixels = compose(world.rgba[rows], draw_backgrounds(len(rows), generator))
    ranks = caption_ranks(scorer.embed_images(pixels), scorer.embed_texts([world.captions[i] for i in rows]))
    return {"rank-1": float((ranks < 1).float().mean()), "rank-5": float((ranks < 5).float().mean())}


def one_per_concept(world: World) -> list[int]:
    """One row per concept, the styles taking turns."""
    rows: dict[str, list[int]] = {}
    for i, concept in enumerate(world.concepts):
        rows.setdefault(concept, []).append(i)
    return [members[turn % len(members)] for turn, members in enumerate(rows.values())]


@torch.no_grad()
def measure_vae(options: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(HERE / "base", subfolder="vae")
    pixels = heldout_pixels()
    pca = load_pca()
    figures = {
        "heldout dB": psnr(vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1), pixels),
        "patch PCA dB": psnr(pca.decode(pca.encode(pixels)).clamp(-1, 1), pixels),
        "parameters": sum(p.numel() for p in vae.parameters()),
    }
    keep("vae", figures)


def psnr(a_B3HW: Tensor, b_B3HW: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; pixels in [-1, 1]."""
    mse_B = ((a_B3HW - b_B3HW) / 2).square().flatten(1).mean(1)
    return float((-10 * mse_B.log10()).mean())


def heldout_pixels(count: int | None = None) -> Tensor:
    """The committed held-out pictures, which are opaque."""
    world = read_world(HERE / "data" / "heldout")
    return compose(world.rgba, torch.zeros(len(world), dtype=torch.long))[:count]


def measure_base(options: argparse.Namespace) -> None:
    """Pictures of 100 training captions from the text alone; the judge looks for the right caption among the 100.

    Then the same captions with a style and a background added: whether they are drawn as well.
    """
    from diffusers import StableDiffusionPipeline

    captions = captions_of_concepts()
    pipeline = StableDiffusionPipeline.from_pretrained(options.base)
    pipeline.set_progress_bar_config(disable=True)
    pixels = draw_texts(pipeline, captions, options)
    judge = ClipScorer.from_pretrained(f"local-dir:{HERE / 'judge'}")
    ranks = caption_ranks(judge.embed_images(pixels), judge.embed_texts(captions))
    figures = {
        "rank-1": float((ranks < 1).float().mean()),
        "rank-5": float((ranks < 5).float().mean()),
        "steps": options.steps,
        "guidance": options.guidance,
        "guidance_rescale": options.guidance_rescale,
        "captions": len(captions),
    }
    styles = [list(STYLE_WORDS)[i % len(STYLE_WORDS)] for i in range(COUNT)]
    backgrounds = torch.arange(COUNT) % len(COLOURS)
    told = [describe(*parts) for parts in zip(captions, styles, backgrounds.tolist(), strict=True)]
    drawn = draw_texts(pipeline, told, options)
    figures["background named, right"] = float((nearest_colour(drawn) == backgrounds).float().mean())
    figures["style named, right"] = share_equal(tell_styles(judge, drawn, captions, list(STYLE_WORDS)), styles)
    keep(options.key or "base", figures)
    if options.key is None:
        save_grid(pixels[:64], captions[:64], IMAGES / "base.png")


def draw_texts(pipeline: Any, texts: list[str], options: argparse.Namespace) -> Tensor:
    """pixels_B3HW in [-1, 1], picture i from seed i."""
    pictures = []
    for start in range(0, len(texts), 25):
        piece = range(start, min(start + 25, len(texts)))
        out = pipeline(
            [texts[i] for i in piece],
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            guidance_rescale=options.guidance_rescale,
            generator=[torch.Generator().manual_seed(i) for i in piece],
            output_type="pt",
        )
        pictures.append(out.images * 2 - 1)
    return torch.cat(pictures)


def save_grid(pixels_B3HW: Tensor, titles: list[str], path: Path, columns: int = 8, cell_px: int = 96) -> None:
    from PIL import ImageDraw

    line_px = 14
    rows = -(-len(pixels_B3HW) // columns)
    grid = Image.new("RGB", (columns * cell_px, rows * (cell_px + line_px)), "white")
    pen = ImageDraw.Draw(grid)
    for i, (picture, title) in enumerate(zip(to_uint8(pixels_B3HW), titles, strict=True)):
        x, y = i % columns * cell_px, i // columns * (cell_px + line_px)
        cell = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(
            (cell_px - 4, cell_px - 4), Image.Resampling.LANCZOS
        )
        grid.paste(cell, (x + 2, y))
        pen.text((x + 2, y + cell_px - 2), title[:16], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path, optimize=True)


def measure_adapter(options: argparse.Namespace) -> None:
    """100 held-out prompts, three seeds: alone with λ = 0 and ``--scale``, λ = 0.5 with texts of other things."""
    from ipa.export.loading import load_model

    prompts = Prompts(load_model(options.adapter))
    figures: dict[str, Any] = {"style, real pictures": prompts.share_of_style(prompts.pixels)}
    for seed in (0, 1, 2):
        for scale in (0.0, options.scale):
            pixels = prompts.draw(options, scale, [""] * COUNT, seed)
            if options.key is None and (seed, scale) == (0, options.scale):
                save_pairs(prompts.pixels, pixels)
            for name, value in prompts.score(pixels).items():
                figures.setdefault(f"scale {scale:g}, {name}", []).append(round(value, 4))
        texts = captions_of_concepts()
        pixels = prompts.draw(options, 0.5, texts, seed)
        for name, value in prompts.score_both(pixels, texts).items():
            figures.setdefault(f"scale 0.5 and text, {name}", []).append(round(value, 4))
    how = {"steps": options.steps, "guidance": options.guidance, "guidance_rescale": options.guidance_rescale}
    keep(options.key or "adapter", figures | how)


def save_pairs(prompts_B3HW: Tensor, pixels_B3HW: Tensor, count: int = 64) -> None:
    """The first image prompts, numbered, each with what was made of it to its right."""
    pairs = torch.stack([prompts_B3HW[:count], pixels_B3HW[:count]], 1).flatten(0, 1)
    save_grid(pairs, [f"{i // 2 + 1}" * (i % 2 == 0) for i in range(2 * count)], IMAGES / "heldout.png", columns=16)


class Prompts:
    """The held-out image prompts of a model, and the judges of what it makes of them."""

    def __init__(self, model: Any) -> None:
        world = read_world(HERE / "data" / "heldout")
        self.model, self.pixels = model, heldout_pixels(COUNT)
        self.captions, self.styles = world.captions[:COUNT], world.styles[:COUNT]
        self.features: Features = model.encode_reference(to_uint8(self.pixels))
        self.judge = ClipScorer.from_pretrained(f"local-dir:{HERE / 'judge'}")

    def draw(self, options: argparse.Namespace, scale: float, texts: list[str], seed: int) -> Tensor:
        from ipa.sampling import SamplingOptions, generate

        how = SamplingOptions(
            num_steps=options.steps,
            guidance=options.guidance,
            scale=scale,
            guidance_rescale=options.guidance_rescale,
        )
        return generate(self.model, self.features, texts, range(1000 * seed, 1000 * seed + COUNT), how)

    def score(self, pixels: Tensor) -> dict[str, float]:
        found = {}
        for metric in (ClipCosines(self.judge), BorderColour()):
            metric.update(pixels, self.pixels, [[caption] for caption in self.captions])
            found |= {name: float(value) for name, value in metric.compute().items()}
        return {**found, "style": self.share_of_style(pixels)}

    def share_of_style(self, pixels: Tensor) -> float:
        """Of the pictures whose drawing style is their prompt's."""
        told = tell_styles(self.judge, pixels, self.captions, sorted(set(self.styles)))
        return share_equal(told, self.styles)

    def score_both(self, pixels: Tensor, texts: list[str]) -> dict[str, float]:
        """Whether the text's thing is on the image's background."""
        ranks = caption_ranks(self.judge.embed_images(pixels), self.judge.embed_texts(texts))
        same = nearest_colour(pixels) == nearest_colour(self.pixels)
        return {
            "rank-1": float((ranks < 1).float().mean()),
            "rank-5": float((ranks < 5).float().mean()),
            "background": float(same.float().mean()),
        }


def nearest_colour(pixels_B3HW: Tensor) -> Tensor:
    """Which of the world's backgrounds is nearest to the border's colour in CIE Lab."""
    colours = rgb_to_lab(COLOURS.double() / 255)
    return torch.cdist(border_lab(pixels_B3HW, BorderColour().width), colours).argmin(1)


def tell_styles(judge: ClipScorer, pixels_B3HW: Tensor, captions: list[str], styles: list[str]) -> list[str]:
    """The drawing style of each picture, zero-shot: which of "CAPTION STYLE style" the judge finds nearest.

    ``captions`` are those of the image prompts.
    """
    images_BE = judge.embed_images(pixels_B3HW)
    texts_SBE = [judge.embed_texts([describe(caption, style) for caption in captions]) for style in styles]
    cosines_BS = torch.stack([(images_BE * texts_BE).sum(1) for texts_BE in texts_SBE], 1)
    return [styles[number] for number in cosines_BS.argmax(1)]


def share_equal(one: list[str], other: list[str]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def captions_of_concepts(count: int = COUNT) -> list[str]:
    """Of training concepts that are evenly spaced in the shards' order."""
    world = read_world(HERE / "data" / "train")
    rows = one_per_concept(world)
    return [world.captions[rows[i * len(rows) // count]] for i in range(count)]


def draw_curves(options: argparse.Namespace) -> None:
    """Loss against minutes of every training, from the CSVs beside the checkpoints."""
    import csv

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = sorted((HERE / "build").glob("*/*.csv"))
    if not paths:
        raise UserError("there is no training in demo/build: `make demo-world` makes them, in hours")
    figure, axes = pyplot.subplots(1, len(paths), figsize=(4 * len(paths), 3), layout="constrained")
    for axis, path in zip(axes, paths, strict=True):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for name in rows[0].keys() - {"step", "minutes"}:
            axis.plot([float(row["minutes"]) for row in rows], [float(row[name]) for row in rows], label=name)
        axis.set(title=f"{path.stem} ({rows[-1]['step']} steps)", xlabel="minutes", yscale="log")
        axis.legend()
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "curves.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clip", "vae", "base", "adapter", "curves"))
    parser.add_argument("adapter", type=Path, nargs="?", help="run folder or adapter file")
    parser.add_argument("--models", type=Path, default=HERE, help="folder of encoder/ and judge/ (default: demo)")
    parser.add_argument("--names", nargs="+", choices=tuple(RECIPES), default=list(RECIPES), help="which clip measures")
    parser.add_argument("--base", type=Path, default=HERE / "base", help="pipeline folder that base measures")
    parser.add_argument("--steps", type=positive_int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--guidance-rescale", type=float, default=0.7, help="φ in [0, 1]")
    parser.add_argument("--scale", type=float, default=1.0, help="adapter only: λ of the image prompt alone")
    parser.add_argument("--key", help="name in figures.json of an adapter's or another base's figures")
    options = parser.parse_args()
    if options.what == "adapter" and options.adapter is None:
        parser.error("adapter needs a run folder or a file, for example demo/adapters/decoupled_global.safetensors")
    measures = {
        "clip": measure_clip,
        "vae": measure_vae,
        "base": measure_base,
        "adapter": measure_adapter,
        "curves": draw_curves,
    }
    try:
        measures[options.what](options)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
