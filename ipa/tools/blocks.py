"""Print the blocks of a base and its presets of λ per block; measure what each block carries of an image prompt.

    python -m ipa.tools.blocks base=demo/base
    python -m ipa.tools.blocks base=stabilityai/stable-diffusion-xl-base-1.0
    python -m ipa.tools.blocks adapter=FILE images=FOLDER 'text=[a house,a dog]' out=blocks.md

The first form reads the configuration alone, no weights. With ``images=`` it makes an image from each image prompt and
the texts in turn, with λ in one block at a time, and writes a table: what the images have of their prompts, and what
they keep of the base's image of the same text and noise. docs/combine.md tells how to read it and to make presets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from ipa.cli import quiet_libraries
from ipa.errors import UserError
from ipa.files import pictures_in, write_atomically
from ipa.presets import own_presets, preset_names, read_blocks
from ipa.tools.options import option, tool


@dataclass
class Options:
    base: str | None = option(None, "base model: diffusers folder or hub id; with adapter=: in place of the metadata's")
    adapter: str | None = option(None, "adapter file or run folder, for images=")
    images: str | None = option(None, "folder of image prompts: measure with them, a hundred or more")
    text: list[str] = option([""], "texts for the images, in turn")
    presets: list[str] = option([], "presets to measure as well")
    limit: int = option(100, "of the image prompts, the first so many by name", at_least=2, at_most=100_000)
    scale: float = option(1.0, "λ", at_least=0, at_most=100)
    judge: str = option("ViT-L-14-quickgelu", "CLIP for CLIP-I, one that the adapter does not read: open_clip's name")
    judge_weights: str | None = option("openai", "its weights; null for local-dir:FOLDER")
    out: str | None = option(None, "Markdown file for the table; null: printed alone")


def blocks(options: Any) -> Path | None:
    if options.images is not None:
        return measure(options)
    if options.base is None:
        raise UserError("please give base=…, or adapter=… and images=…")
    describe_blocks(options.base)
    return None


def describe_blocks(base: str) -> None:
    from ipa.families import family_of

    blocks, own = family_of(base, key="base").read_blocks(base), own_presets(base)
    for number, name in enumerate(blocks):
        print(f"{number:3} {name}")
    presets = {preset: read_blocks(preset, blocks, own) for preset in preset_names(blocks, own)}
    for preset, weights in presets.items():
        pushed = {name: -factor for name, factor in weights.pushed.items()}
        factors = " ".join(f"{(weights.shown | pushed).get(name, 0.0):5.2f}" for name in blocks)
        print(f"{preset:24} {factors}")
    if any(weights.pushed for weights in presets.values()):
        print("\nNegative: the image takes part in guidance's negative part, which pushes away from it.")


def measure(options: Any) -> Path | None:
    """The table of `ipa.evaluation.blocks.sweep`; raises UserError before weights are read where possible."""
    from tqdm import tqdm

    from ipa.evaluation.blocks import as_table, selections, sweep
    from ipa.prompter import Prompter
    from ipa.references import open_image

    if options.adapter is None:
        raise UserError("please give adapter=… and images=FOLDER")
    pictures = [open_image(path, "images") for path in pictures_in(options.images, "images")[: options.limit]]
    quiet_libraries()
    prompter = Prompter.load(options.adapter, base=options.base)
    blocks, own = prompter.family.blocks(), own_presets(prompter.family.source)
    for name in options.presets:
        read_blocks(name, blocks, own)  # raises
    measures = measures_of(options.judge, options.judge_weights)
    chosen = selections(blocks) | {name: name for name in options.presets}
    texts = list(islice(cycle(options.text), len(pictures)))
    rows = sweep(prompter, pictures, texts, measures, chosen, options.scale)
    found = dict(tqdm(rows, total=len(chosen), desc="blocks"))
    table = as_table(found, measures)
    print(table)
    if options.out is None:
        return None
    write_atomically(Path(options.out), lambda path: path.write_text(table + "\n"))
    return Path(options.out)


def measures_of(judge: str, weights: str | None) -> Sequence[Any]:
    """What any base can be measured by."""
    from ipa.evaluation.blocks import Measure
    from ipa.metrics.border import BorderColour
    from ipa.metrics.clip import load_scorer
    from ipa.metrics.clip_scores import ClipCosines
    from ipa.metrics.edges import EdgeOverlap

    scorer = load_scorer(judge, weights)
    return [
        Measure("CLIP-I", lambda: ClipCosines(scorer), "clip_i"),
        Measure("its own prompt nearest (%)", lambda: ClipCosines(scorer), "retrieval_at_1", digits=0, factor=100),
        Measure("border ΔE to the prompt", BorderColour, "border_lab", digits=1),
        Measure("edges of the prompt, gain", EdgeOverlap, "edges", gain=True, digits=3),
        Measure("edges of the base's image", EdgeOverlap, "edges", against_base=True),
        Measure("CLIP-I to the base's image", lambda: ClipCosines(scorer), "clip_i", against_base=True),
    ]


main = tool(Options, blocks, __doc__)

if __name__ == "__main__":
    main()
