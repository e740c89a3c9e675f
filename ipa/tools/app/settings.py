"""The values of the page → the settings of `ipa.tools.sample`, and these as a command and as Python.

The page's values become the command's arguments, which the command's own parser checks.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from math import prod
from typing import Any

from ipa.errors import UserError
from ipa.tools.app.uploads import MAX_ENLARGEMENT, MAX_IMAGES, MAX_STEPS, MAX_TEXT_LENGTH
from ipa.tools.options import as_arguments, read_options
from ipa.tools.pipelines import OPTIONS as PIPELINE
from ipa.tools.sample import SAMPLING, Options, axes_of, settings_of

LOADING = ("base", "base_config", "encoder", "encoder_weights", "dtype")
# arguments of a call of the prompter
CALL = ("negative_text", "start", "end", "mask", "combine", *SAMPLING, "width", "height")
AXES = ("adapter", "scale", "blocks")  # of a grid; seeds are one argument
COMMAND = "python -m ipa.tools.sample"


def read_page(page: Mapping[str, Any], fixed: Mapping[str, Any], native_px: int) -> dict[str, Any]:
    """Checked settings; ``fixed`` are those of the page's own command line. Raises UserError."""
    settings = {**fixed, **{name: page[name] for name in CALL}}
    if page["seed"] is None or page["count"] is None:
        raise UserError("please give a seed, and how many images")
    seeds = [int(page["seed"]) + number for number in range(int(page["count"]))]
    settings |= {name: list(page[name] or []) for name in ("adapter", "image", "blocks")}
    settings |= {"text": [page["text"]], "scale": scales_of(page), "seed": seeds}
    if page["start_image"]:
        settings |= {name: page[name] for name in ("start_image", "strength")}
    if page["control"]:
        settings |= {name: page[name] for name in ("control", "control_weight")}
    else:
        settings["control_model"] = None
    if not settings["image"]:
        raise UserError("please give a picture first")
    check_limits(settings, native_px)
    return settings_of(read_options(as_arguments(Options, settings), Options))


def scales_of(page: Mapping[str, Any]) -> list[float]:
    words = (page["scales"] or "").replace(",", " ").split()
    try:
        return [float(word) for word in words] or [page["scale"]]
    except ValueError:
        raise UserError(f"λ side by side: {page['scales']}: give numbers, such as 0, 0.5, 1") from None


def check_limits(settings: Mapping[str, Any], native_px: int) -> None:
    """Limits for a shared machine, which the command does not have."""
    images = prod(len(settings[name]) or 1 for name in (*AXES, "seed"))
    largest = MAX_ENLARGEMENT * native_px
    if not 1 <= images <= MAX_IMAGES:
        raise UserError(
            f"this makes {images} images (λ × presets × adapters × seeds): from 1 to {MAX_IMAGES} can be made"
        )
    if (settings["num_steps"] or 0) > MAX_STEPS:
        raise UserError(f"steps: at most {MAX_STEPS}")
    if any((settings[name] or 0) > largest for name in ("width", "height")):
        raise UserError(f"width and height: at most {largest} px")
    if any(len(text) > MAX_TEXT_LENGTH for text in (*settings["text"], settings["negative_text"])):
        raise UserError(f"the text has more than {MAX_TEXT_LENGTH} letters")


def as_command(settings: Mapping[str, Any]) -> str:
    """For a shell, in the folder of the pictures."""
    return " \\\n    ".join([COMMAND, *map(shlex.quote, as_arguments(Options, settings))])


def as_python(settings: dict[str, Any]) -> str:
    """A script that makes ``images``, a list, row by row of the command's grid."""
    adapters, axes = settings["adapter"], {name: values for name, values in axes_of(settings).items() if name in AXES}
    several = {name: values for name, values in axes.items() if len(values) > 1}
    options = pipeline_options(settings)
    lines = ["from ipa.prompter import Prompter"]
    if options:
        lines.append("from ipa.tools.pipelines import make_pipeline")
    lines.append("")
    loading = [repr(adapters if len(adapters) > 1 else adapters[0]), *written(changed(settings, LOADING))]
    lines.append(f"prompter = Prompter.load({', '.join(loading)})")
    given: dict[str, Any] = {name: values[0] for name, values in axes.items() if values[0] not in (None, 0)}
    given |= {"scale": axes["scale"][0], **changed(settings, CALL)}
    given["seed"] = settings["seed"] if len(settings["seed"]) > 1 else settings["seed"][0]
    extra = [f"{name}={name}" for name in several]
    if options:
        lines.append(f"pipeline, arguments = make_pipeline(prompter, {', '.join(written(options))})")
        extra += ["pipeline=pipeline", "arguments=arguments"]
    own = {name: value for name, value in given.items() if name not in several}
    call = [repr(settings["image"]), repr(settings["text"][0]), *written(own), *extra]
    if several:
        lines.append("images = []")
    lines += [f"{'    ' * depth}for {name} in {values!r}:" for depth, (name, values) in enumerate(several.items())]
    indent = "    " * len(several)
    lines.append(f"{indent}images {'+=' if several else '='} prompter(")
    return "\n".join([*lines, *(f"{indent}    {each}," for each in call), f"{indent})", ""])


def pipeline_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of `ipa.tools.pipelines.make_pipeline`; empty where the prompter's own pipeline does it."""
    if not (settings["start_image"] or settings["control"]):
        return {}
    return {name: settings[name] for name, default in PIPELINE.items() if settings[name] != default}


def changed(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The settings of these ``names`` that differ from the command's defaults."""
    defaults = settings_of(read_options(["adapter=a", "image=a"], Options))
    return {name: settings[name] for name in names if settings[name] != defaults[name]}


def written(given: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in given.items()]
