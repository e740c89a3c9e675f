"""Generate images with trained adapters.

    python -m ipa.tools.sample adapter=runs/…/adapter.safetensors image=photo.png text="red apple" scale=0.5 out=new.png
    python -m ipa.tools.sample adapter=FILE image=photo.png 'scale=[0,0.5,1]' 'seed=[1,2,3]'    # a labelled grid
    python -m ipa.tools.sample adapter=FILE image=FOLDER out=FOLDER                             # an image for each
    python -m ipa.tools.sample again=new.png seed=7                                             # its settings, changed

Base, encoder, steps and guidance are those of the adapter's training, from its metadata or its run folder, unless they
are given. If base and encoder do not fit the adapter, this fails before any weights are read. PNG files contain all
settings.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from ipa.cli import quiet_libraries
from ipa.errors import UserError, brief
from ipa.files import pictures_in
from ipa.presets import SCALINGS
from ipa.ranges import MAX_EDGE_PX, TRAINING_STEPS
from ipa.tools.options import option, tool
from ipa.tools.pictures import FORMATS, check_format, grid, read_settings, write_picture

SAMPLING = ("num_steps", "guidance", "guidance_rescale", "keep_outside")
REFERENCE = ("start", "end", "combine", "mask", "embeds_scaling", "subtract_text", "subtract_strength", "tiles")
AXES = ("adapter", "text", "scale", "blocks", "seed")  # lists make a grid; the last one with several goes across
NOT_SETTINGS = ("out", "again", "device")


@dataclass
class Options:
    adapter: list[str] = option([], "adapter file, checkpoint, or run folder; several: a grid, or for references=")
    image: list[str] = option([], "image prompt; several are one prompt together; a folder: an image for each")
    text: list[str] = option([""], "text prompt")
    negative_text: str = option("", "text of guidance's negative part")
    scale: list[float] = option([1.0], "λ, the weight of the image prompt; 0 ignores it", at_least=0, at_most=100)
    blocks: list[str] = option([], "λ per block: presets by name, see python -m ipa.tools.blocks")
    seed: list[int] = option([0], "seed", at_least=0, at_most=2**63 - 1)
    start: float = option(0.0, "the image acts from here, a fraction of the noise schedule", at_least=0, at_most=1)
    end: float = option(1.0, "to here", at_least=0, at_most=1)
    mask: str | None = option(None, "picture that is white where the image prompt acts")
    keep_outside: bool = option(False, "keep the image without the prompt outside the masks, in twice the time")
    combine: str = option("concat", "several images: concat, add, average, norm average, subtract, max, min")
    negative: list[str] = option([], "image prompt of guidance's negative part, as many as image=")
    embeds_scaling: str = option("V only", "where λ enters: behind the softmax, or inside it", one_of=SCALINGS)
    subtract_text: str = option("", "content to take out of the image's embedding, as words")
    subtract_strength: float = option(1.0, "how much of it", at_least=0)
    tiles: bool = option(False, "divide the image prompt into tiles that act in their own rectangles")
    references: str | None = option(None, "prompts in place of image=: [{images: a.png, scale: 0.5, adapter: 1}, …]")
    out: str = option("picture.png", f"a file, one of {', '.join(FORMATS)}; for image=FOLDER a folder")
    num_steps: int | None = option(None, "steps; null: the training's, or else 25", at_least=1, at_most=TRAINING_STEPS)
    guidance: float | None = option(None, "1: none; null: the training's, or the base's", at_least=0, at_most=1000)
    guidance_rescale: float | None = option(None, "φ, less contrast; 0.7 for zero terminal SNR", at_least=0, at_most=1)
    width: int | None = option(None, "of an image (px); null: the base's native size", at_least=8, at_most=MAX_EDGE_PX)
    height: int | None = option(None, "of an image (px)", at_least=8, at_most=MAX_EDGE_PX)
    scheduler: str | None = option(None, "a scheduler of diffusers, as EulerDiscreteScheduler; null: DDIM")
    start_image: str | None = option(None, "image to image: what to start from")
    strength: float = option(0.8, "image to image: how much of it is noised", at_least=0, at_most=1)
    inpaint: str | None = option(None, "with start_image: picture that is white where it is painted anew")
    control: str | None = option(None, "control image, such as edges")
    control_model: str | None = option(None, "ControlNet or T2I-Adapter that reads it: folder or hub id")
    control_weight: float = option(1.0, "of the control", at_least=0)
    base: str | None = option(None, "base model in place of the metadata's: diffusers folder, hub id or .safetensors")
    base_config: str | None = option(None, "for a base in one file: diffusers folder or hub id with its layout")
    encoder: str | None = option(None, "in place of the metadata's: open_clip name, local-dir:FOLDER or transformers")
    encoder_weights: str | None = option(None, "open_clip's tag of pretrained weights, or a file")
    device: str | None = option(None, "torch device; null: a GPU if there is one, or else the CPU")
    dtype: str = option("float32", "data type of the frozen weights", one_of=("float32", "float16", "bfloat16"))
    again: str | None = option(None, "a PNG of this tool: take its settings, but for those that are given")


def sample(options: Any) -> Path:
    """Generate the images and write them; returns the file or folder. Raises UserError."""
    settings = settings_of(options)
    out, images = Path(options.out), settings["image"]
    folder = Path(images[0]) if len(images) == 1 and Path(images[0]).is_dir() else None
    if folder is None:
        check_format(out)
    elif out.resolve() == folder.resolve():
        raise UserError(f"out={out} is the folder of the image prompts: give another one")
    quiet_libraries()
    check(settings)
    found = [] if folder is None else pictures_in(folder, "image")
    prompter = load(settings, options.device)
    calls = pipeline_of(prompter, settings)
    if folder is None:
        write_picture(make(prompter, settings, *calls), out, settings)
        return out
    from tqdm import tqdm

    from ipa.references import open_reference

    broken = []
    for each, path in tqdm(missing(found, out), disable=len(found) < 2 or None):
        try:
            open_reference(each)
        except UserError as error:
            broken.append(str(error))
            continue
        job = {**settings, "image": [str(each)]}
        write_picture(make(prompter, job, *calls), path, job)
    if broken:
        raise UserError("\n".join([*broken, f"wrote the others to {out}"]))
    return out


def settings_of(options: Any) -> dict[str, Any]:
    """Everything that determines the images, as plain, unresolved data; raises UserError for unusable values."""
    given: Any = OmegaConf.to_container(options)
    settings: dict[str, Any] = {name: value for name, value in given.items() if name not in NOT_SETTINGS}
    if not settings["adapter"]:
        raise UserError("please give adapter=…")
    for name in ("text", "scale", "seed"):
        if not settings[name]:
            raise UserError(f"{name}=[]: give at least one")
    read_references(settings)
    return settings


def check(settings: dict[str, Any]) -> None:
    """Raise UserError for unusable options and broken images, before the models are loaded."""
    from ipa.references import open_reference
    from ipa.tools.pipelines import check_pipeline

    check_pipeline(settings)
    references = read_references(settings)
    if settings["keep_outside"] and not any(each.get("mask") or each.get("tiles") for each in references):
        raise UserError("keep_outside=true: give mask=, white where the image acts; without it nothing is outside")
    for name, each in pictures_of(references):
        open_reference(each, name)


def missing(pictures: list[Path], out: Path) -> list[tuple[Path, Path]]:
    """The image prompts and their files in ``out``, without those that exist already."""
    stems = Counter(each.stem for each in pictures)
    paths = [out / f"{each.stem if stems[each.stem] == 1 else each.name}.png" for each in pictures]
    return [(each, path) for each, path in zip(pictures, paths, strict=True) if not path.is_file()]


def read_references(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The image prompts as fields of `Reference`, without the λ and blocks of a grid."""
    if settings["references"] is None:
        if not settings["image"]:
            raise UserError("image=[]: give at least one image prompt")
        own = {name: settings[name] for name in REFERENCE} | {"negative": settings["negative"] or None}
        return [{"images": settings["image"], **own}]
    return parse_references(settings["references"])


def parse_references(text: str) -> list[dict[str, Any]]:
    try:
        given: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"references={text} is not YAML: {brief(error)}") from error
    if not isinstance(given, list) or not all(isinstance(each, dict) and "images" in each for each in given):
        raise UserError(f"references={text}: give a list [{{images: a.png, scale: 0.5}}, …]")
    from ipa.references import Reference

    names = [field.name for field in fields(Reference)]
    for each in given:
        if unknown := each.keys() - set(names):
            raise UserError(f"references: {', '.join(map(str, unknown))} is none of {', '.join(names)}")
    return given


def pictures_of(references: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The pictures with the option that each is given by, but for a folder of image prompts; raises UserError."""
    from ipa.references import Reference, as_list

    found = []
    for each in references:
        reference = Reference(**each)
        found += [("image", picture) for picture in as_list(reference.images) if not Path(picture).is_dir()]
        found += [("negative", picture) for picture in as_list(reference.negative or [])]
        found += [] if reference.mask is None else [("mask", reference.mask)]
    return found


def load(settings: dict[str, Any], device: str | None) -> Any:
    from ipa.prompter import Prompter

    parts = {name: settings[name] for name in ("base", "base_config", "encoder", "encoder_weights", "dtype")}
    return Prompter.load(settings["adapter"], device, **parts)


def pipeline_of(prompter: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of its call."""
    from ipa.tools.pipelines import OPTIONS, make_pipeline

    return make_pipeline(prompter, **{name: settings[name] for name in OPTIONS})


def make(prompter: Any, settings: dict[str, Any], pipeline: Any, arguments: dict[str, Any]) -> Any:
    """The image, or a labelled grid of all combinations of what is given as lists."""
    axes = axes_of(settings)
    across = [AXES[-1], *(name for name, values in axes.items() if len(values) > 1)][-1]
    sampling = {name: settings[name] for name in SAMPLING if settings[name] is not None}
    size = {name: settings[name] for name in ("width", "height")}
    made = prompter.generate(items_of(settings), pipeline=pipeline, arguments=arguments, **size, **sampling)
    if len(made) == 1:
        return made[0]
    width = len(axes[across])
    cells = [made[first : first + width] for first in range(0, len(made), width)]
    shown = [name for name in AXES if name != across and len(axes[name]) > 1]
    labels = {name: [label(name, value, settings) for value in axes[name]] for name in AXES}
    rows = product(*(labels[name] for name in shown))
    return grid(cells, [", ".join(row) for row in rows], labels[across])


def axes_of(settings: dict[str, Any]) -> dict[str, list[Any]]:
    """The values of each axis of the grid; an adapter is its number."""
    adapters = [0] if settings["references"] else list(range(len(settings["adapter"])))
    return {name: settings[name] or [None] for name in AXES} | {"adapter": adapters}


def items_of(settings: dict[str, Any]) -> list[Any]:
    """What each image of the grid is made from, row by row."""
    from ipa.references import Item, Reference

    axes, references, found = axes_of(settings), read_references(settings), []
    for adapter, text, scale, blocks, seed in product(*(axes[name] for name in AXES)):
        of_grid = {"adapter": adapter, "scale": scale, "blocks": blocks}
        own = [of_grid | each if settings["references"] else each | of_grid for each in references]
        found.append(Item([Reference(**each) for each in own], text, settings["negative_text"], seed))
    return found


def label(name: str, value: Any, settings: dict[str, Any]) -> str:
    if name == "adapter":
        path = Path(settings["adapter"][value])
        return path.parent.name if path.stem == "adapter" else path.stem  # of a run folder: the run's name
    return {"scale": f"scale {value}", "seed": f"seed {value}"}.get(name, str(value))


def saved() -> dict[str, Any]:
    """The settings of ``again=PNG``."""
    files = [each.partition("=")[2] for each in sys.argv[1:] if each.startswith("again=")]
    known = {field.name for field in fields(Options)} - set(NOT_SETTINGS)
    return {name: value for name, value in read_settings(Path(files[-1])).items() if name in known} if files else {}


main = tool(Options, sample, __doc__, saved=saved)

if __name__ == "__main__":
    main()
