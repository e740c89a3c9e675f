"""The figures and pictures of docs/combine.md: what the demo adapter does together with other things.

    python demo/combine.py blocks      # what each block of the base carries of an image prompt, and its presets
    python demo/combine.py control     # edges of one picture, look of another
    python demo/combine.py mask        # how much a mask limits the change to its region
    python demo/combine.py concept     # after make_concept.py: what embedding and LoRA add to an image prompt

Each has 100 items, prints tables with 95 % intervals over them (half their width after ±), and writes examples to
docs/images. Images are kept in demo/build/combine, so that a stopped command resumes. The judge is demo/judge, which no
adapter reads; the drawing style is classified by a linear probe on its embeddings, fitted on demo/data/train.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from make_concept import CONCEPT, WORD
from make_control import control_image
from measure import captions_of_concepts, heldout_pixels, nearest_colour, pooled
from PIL import Image
from torch import Tensor
from world import COLOUR_NAMES, HERE, SIZE_PX, compose, draw_backgrounds, positive_int, read_world

sys.path.insert(0, str(HERE.parent))

from ipa.evaluation.blocks import ALL, NONE, Measure, Row, as_table, draw, measured, pixels_of, selections, shown
from ipa.files import hash_file, write_atomically
from ipa.metrics.bootstrap import Interval
from ipa.metrics.border import BorderColour
from ipa.metrics.clip import load_scorer
from ipa.metrics.clip_scores import ClipCosines, caption_ranks
from ipa.metrics.edges import EdgeOverlap
from ipa.metrics.image_metric import Images, ItemMetric
from ipa.presets import FILE
from ipa.prompter import Prompter
from ipa.references import Item, Reference
from ipa.tools.pictures import grid
from ipa.types import to_uint8

COUNT, SHIFT, BATCH = 100, 50, 25
EXAMPLES = (2, 5, 17, 18, 20, 59)  # rows of the pictures
CELL_PX = 112
IMAGES, BUILD = HERE.parent / "docs" / "images", HERE / "build" / "combine"
JUDGE = f"local-dir:{HERE / 'judge'}"


@functools.cache
def style_probe() -> Any:
    """A classifier of drawing styles on the judge's embeddings, which were trained to tell them."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    world = read_world(HERE / "data" / "train")
    pixels = compose(world.rgba, draw_backgrounds(len(world), torch.Generator().manual_seed(0)))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return probe.fit(pooled(load_scorer(JUDGE), pixels).numpy(), world.styles)


class StyleRight(ItemMetric):
    """style: whether an image has its prompt's drawing style; ``styles`` are those of the images of the one update."""

    def __init__(self, styles: Sequence[str], **kwargs: Any) -> None:
        super().__init__(["style"], {"style": True}, **kwargs)
        self.styles = list(styles)

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        told = style_probe().predict(pooled(load_scorer(JUDGE), torch.stack(list(generated))).numpy())
        return {"style": torch.tensor([float(one == other) for one, other in zip(told, self.styles, strict=True)])}


class SameBackground(ItemMetric):
    """background: whether the nearest of the world's twelve backgrounds is the prompt's."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(["background"], {"background": True}, **kwargs)

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        one, other = (nearest_colour(torch.stack(list(each))) for each in (generated, references))
        return {"background": (one == other).float()}


class TextFirst(ItemMetric):
    """text: whether the judge ranks an image's own text among the first five of all ``texts``."""

    def __init__(self, texts: Sequence[str], **kwargs: Any) -> None:
        super().__init__(["text"], {"text": True}, **kwargs)
        self.texts = list(texts)

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        judge = load_scorer(JUDGE)
        ranks = caption_ranks(judge.embed_images(generated), judge.embed_texts(self.texts))
        return {"text": (ranks < 5).float()}


def cosines() -> ItemMetric:
    return ClipCosines(load_scorer(JUDGE))


def world_measures(styles: Sequence[str], texts: Sequence[str]) -> list[Measure]:
    return [
        Measure("CLIP-I", cosines, "clip_i"),
        Measure("concept of the prompt (retrieval@1, %)", cosines, "retrieval_at_1", digits=0, factor=100),
        Measure("style of the prompt (%)", lambda: StyleRight(styles), "style", digits=0, factor=100),
        Measure("background of the prompt (%)", SameBackground, "background", digits=0, factor=100),
        Measure("border ΔE to the prompt", BorderColour, "border_lab", digits=1),
        Measure("edges of the prompt, gain", EdgeOverlap, "edges", gain=True, digits=3),
        Measure("edges of the base's image", EdgeOverlap, "edges", against_base=True),
        Measure("concept of the text (rank 5 of 100, %)", lambda: TextFirst(texts), "text", digits=0, factor=100),
    ]


def heldout() -> tuple[list[Image.Image], list[str]]:
    """The first 100 held-out pictures and their styles."""
    return as_pictures(heldout_pixels(COUNT)), read_world(HERE / "data" / "heldout").styles[:COUNT]


def as_pictures(pixels_B3HW: Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.asarray(each.permute(1, 2, 0))) for each in to_uint8(pixels_B3HW)]


def rows_of(
    options: argparse.Namespace,
    cases: Mapping[str, Callable[[], list[Image.Image]]],
    references: Sequence[Image.Image],
    measures: Sequence[Measure],
    base: str = "",
) -> dict[str, Row]:
    """A row for each case; its images are kept in demo/build/combine, so that a stopped command resumes.

    ``base`` is the case whose images take the place of the references where a measure asks for that.
    """
    prompts, found = pixels_of(references), {}
    for name, make in cases.items():
        made = pixels_of(kept(options, name, make))
        found[name] = measured(made, prompts, pixels_of(kept(options, base, cases[base])) if base else made, measures)
    print(f"\n{as_table(found, measures, 'λ in' if base else '')}", flush=True)
    return found


def kept(options: argparse.Namespace, name: str, make: Callable[[], list[Image.Image]]) -> list[Image.Image]:
    """The images of a case as one PNG, made if it is not there; new weights get a folder of their own."""
    path = BUILD / options.what / fingerprint(options, name) / f"{name}.png"
    if not path.is_file():
        write_atomically(path, lambda to: strip(make()).save(to, format="PNG"))
    with Image.open(path) as strip_:
        sheet = strip_.convert("RGB")
    edge = sheet.height
    return [sheet.crop((left, 0, left + edge, edge)) for left in range(0, sheet.width, edge)]


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(each.width for each in pictures), pictures[0].height))
    for number, each in enumerate(pictures):
        sheet.paste(each, (number * each.width, 0))
    return sheet


def fingerprint(options: argparse.Namespace, name: str) -> str:
    """Of everything that the images depend on."""
    parts = {"control": HERE / "control", "concept": HERE / "concept"}.get(options.what, HERE / "base" / "unet")
    files = [Path(options.adapter), *sorted((HERE / "base" / "unet").glob("*.safetensors"))]
    files += sorted(parts.glob("*.safetensors"))
    files += [HERE / "base" / FILE] if name.startswith("preset") else []
    hashes = "".join(hash_file(path) for path in files)
    return hashlib.sha256(f"{hashes} {options.scale} {options.sampling}".encode()).hexdigest()[:12]


def measure_blocks(options: argparse.Namespace) -> None:
    """λ in one block at a time, and with presets; the text names another concept."""
    prompter = Prompter.load(options.adapter)
    (pictures, styles), texts = heldout(), captions_of_concepts()
    chosen = selections(prompter.family.blocks()) | {f"preset {name}": name for name in options.presets}
    cases = {
        name: functools.partial(draw, prompter, pictures, texts, blocks, options.scale, **options.sampling)
        for name, blocks in chosen.items()
    }
    rows_of(options, cases, pictures, world_measures(styles, texts), base=NONE)
    shown = [NONE, ALL, *(name for name in cases if name.startswith("preset"))]
    columns = [pictures, *(kept(options, name, cases[name]) for name in shown)]
    examples = [[column[i] for column in columns] for i in EXAMPLES]
    save(examples, ["image prompt", "text alone", *(name.removeprefix("preset ") for name in shown[1:])], "presets.png")


def measure_control(options: argparse.Namespace) -> None:
    """Edges of picture i, look of picture i + 50; no text."""
    options.sampling |= {"guidance": 3.0, "guidance_rescale": 0.0}  # diffusers' ControlNet pipeline has no rescaling
    prompter = Prompter.load(options.adapter)
    shapes, looks = shifted()
    controls = [edge_picture(each) for each in shapes]
    net = ControlNetModel.from_pretrained(HERE / "control")
    pipeline = prompter.pipeline(StableDiffusionControlNetPipeline, controlnet=net)

    def make(scale: float, controlled: bool) -> list[Image.Image]:
        items = [Item([Reference(look, scale)], seed=seed) for seed, look in enumerate(looks)]
        if not controlled:
            return prompter.generate(items, **options.sampling)
        made = []
        for first in range(0, COUNT, BATCH):
            rows = slice(first, first + BATCH)
            made += prompter.generate(
                items[rows], pipeline=pipeline, arguments={"image": controls[rows]}, **options.sampling
            )
        return made

    cases = {
        "edges alone": lambda: make(0.0, True),
        "image prompt alone": lambda: make(options.scale, False),
        "edges and image prompt": lambda: make(options.scale, True),
    }
    styles = read_world(HERE / "data" / "heldout").styles
    of_looks = [styles[(i + SHIFT) % COUNT] for i in range(COUNT)]
    print("\nagainst the picture of the edges:")
    rows_of(options, cases, shapes, [Measure("edge overlap", EdgeOverlap, "edges")])
    print("\nagainst the image prompt:")
    rows_of(options, cases, looks, look_measures(of_looks))
    columns = [controls, looks, *(kept(options, name, make) for name, make in cases.items())]
    save(
        [[column[i] for column in columns] for i in EXAMPLES],
        ["edges", "image prompt", "edges alone", "prompt alone", "both"],
        "control.png",
    )


def look_measures(styles: Sequence[str]) -> list[Measure]:
    return [
        Measure("CLIP-I", cosines, "clip_i"),
        Measure("style (%)", lambda: StyleRight(styles), "style", digits=0, factor=100),
        Measure("background (%)", SameBackground, "background", digits=0, factor=100),
        Measure("border ΔE", BorderColour, "border_lab", digits=1),
    ]


def shifted() -> tuple[list[Image.Image], list[Image.Image]]:
    """Picture i, and picture i + 50 of the hundred."""
    pictures, _ = heldout()
    return pictures, pictures[SHIFT:] + pictures[:SHIFT]


def edge_picture(picture: Image.Image) -> Image.Image:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    return as_pictures(2 * control_image(pixels) - 1)[0]


def measure_mask(options: argparse.Namespace) -> None:
    """The left half is masked: mean change against the base's image inside and outside."""
    prompter = Prompter.load(options.adapter)
    (pictures, _), texts = heldout(), captions_of_concepts()
    mask = Image.new("L", (SIZE_PX, SIZE_PX))
    mask.paste(255, (0, 0, SIZE_PX // 2, SIZE_PX))

    def make(scale: float, **more: Any) -> list[Image.Image]:
        items = [
            Item([Reference(picture, scale, mask=mask)], text, seed=seed)
            for seed, (picture, text) in enumerate(zip(pictures, texts, strict=True))
        ]
        return prompter.generate(items, **more, **options.sampling)

    cases = {
        "base": lambda: make(0.0),
        "mask": lambda: make(options.scale),
        "mask and keep_outside": lambda: make(options.scale, keep_outside=True),
    }
    made = {name: torch.stack(pixels_of(kept(options, name, make_it))) for name, make_it in cases.items()}
    print("\n| change outside, in % of that inside | anywhere | 8 px and more from the border |\n| --- | --- | --- |")
    for name, pixels in list(made.items())[1:]:
        change_BW = (pixels - made["base"]).abs().mean((1, 2))  # of each column
        inside, half = change_BW[:, : SIZE_PX // 2].mean(1), SIZE_PX // 2
        shares = [ratio_interval(change_BW[:, half + first :].mean(1), inside) for first in (0, 8)]
        print(f"| {name} | {' | '.join(shown(share, 1) for share in shares)} |")
    columns = [pictures, *(as_pictures(pixels) for pixels in made.values())]
    save(
        [[column[i] for column in columns] for i in EXAMPLES],
        ["image prompt", "text alone", "mask", "keep_outside"],
        "mask.png",
    )


def ratio_interval(over_B: Tensor, under_B: Tensor, resamples: int = 1000) -> Interval:
    """Σ over / Σ under in per cent with its 95 % bootstrap interval over the rows."""
    draws = torch.randint(len(over_B), (resamples, len(over_B)), generator=torch.Generator().manual_seed(0))
    ratios = 100 * over_B[draws].sum(1) / under_B[draws].sum(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975])).tolist()
    return Interval(float(100 * over_B.sum() / under_B.sum()), low, high)


def measure_concept(options: argparse.Namespace) -> None:
    """One concept on 100 backgrounds named by the text: what image prompt, embedding and LoRA each add."""
    prompter = Prompter.load(options.adapter)
    pipeline = prompter.pipeline()
    pipeline.load_textual_inversion(str(HERE / "concept"), weight_name="embedding.safetensors")
    picture, caption = heldout()[0][CONCEPT], read_world(HERE / "data" / "heldout").captions[CONCEPT]
    grounds = [ground for i in range(COUNT) if (ground := COLOUR_NAMES[1 + i % (len(COLOUR_NAMES) - 1)])]

    def make(word: str, scale: float, lora: bool) -> list[Image.Image]:
        items = [
            Item([Reference(picture, scale)], f"{word} on {ground} background".strip(), seed=seed)
            for seed, ground in enumerate(grounds)
        ]
        if lora:
            pipeline.load_lora_weights(str(HERE / "concept"), weight_name="lora.safetensors")
        made = prompter.generate(items, pipeline=pipeline, **options.sampling)
        if lora:
            pipeline.unload_lora_weights()
        return made

    ways = {
        "text alone": (caption, 0.0, False),
        "image prompt": ("", options.scale, False),
        "embedding": (WORD, 0.0, False),
        "LoRA": (caption, 0.0, True),
        "image prompt and embedding": (WORD, options.scale, False),
        "image prompt and LoRA": (caption, options.scale, True),
        "all three": (f"{caption} {WORD}", options.scale, True),
    }
    cases = {name: functools.partial(make, *way) for name, way in ways.items()}
    captions = read_world(HERE / "data" / "heldout").captions[:COUNT]
    measures = [
        Measure("CLIP-I to the picture", cosines, "clip_i"),
        Measure("named by the judge (%)", lambda: Named(captions, caption), "named", digits=0, factor=100),
        Measure("background of the text (%)", lambda: GroundRight(grounds), "background", digits=0, factor=100),
    ]
    rows_of(options, cases, [picture] * COUNT, measures)
    columns = [[picture] * COUNT, *(kept(options, name, make) for name, make in cases.items())]
    titles = ["picture", "text", "prompt", "embedding", "LoRA", "prompt + emb.", "prompt + LoRA", "all three"]
    save([[column[i] for column in columns] for i in range(4)], titles, "concept.png")


class Named(ItemMetric):
    """named: whether the judge finds ``caption`` nearest of all ``captions``."""

    def __init__(self, captions: Sequence[str], caption: str, **kwargs: Any) -> None:
        super().__init__(["named"], {"named": True}, **kwargs)
        self.captions, self.number = list(captions), list(captions).index(caption)

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        judge = load_scorer(JUDGE)
        nearest = (judge.embed_images(generated) @ judge.embed_texts(self.captions).T).argmax(1)
        return {"named": (nearest == self.number).float()}


class GroundRight(ItemMetric):
    """background: whether an image's background is the one of ``names``."""

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(["background"], {"background": True}, **kwargs)
        self.numbers = torch.tensor([COLOUR_NAMES.index(name) for name in names])

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        return {"background": (nearest_colour(torch.stack(list(generated))) == self.numbers).float()}


def save(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], name: str) -> None:
    cells = [[each.resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS) for each in row] for row in rows]
    grid(cells, [""] * len(rows), columns).save(IMAGES / name, optimize=True)
    print(f"wrote {IMAGES / name}", file=sys.stderr)


MEASUREMENTS: dict[str, tuple[Callable[[argparse.Namespace], None], float]] = {
    "blocks": (measure_blocks, 1.0),
    "control": (measure_control, 1.0),
    "mask": (measure_mask, 1.0),
    "concept": (measure_concept, 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(MEASUREMENTS))
    parser.add_argument("--adapter", default=str(HERE / "adapters" / "decoupled_global.safetensors"))
    parser.add_argument("--scale", type=float, help="λ of the image prompt (default: 1, with a concept 0.5)")
    parser.add_argument(
        "--steps", type=positive_int, default=10, help="of the sampler; guidance is that of the training"
    )
    parser.add_argument("--presets", nargs="*", default=["style", "composition"], help="blocks: presets to measure")
    options = parser.parse_args()
    measurement, scale = MEASUREMENTS[options.what]
    options.sampling = {"num_steps": options.steps, "batch_size": BATCH}
    options.scale = scale if options.scale is None else options.scale
    measurement(options)


if __name__ == "__main__":
    main()
