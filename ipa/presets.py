"""λ per block: presets by their usual names, and mappings of your own.

Blocks are the denoiser's transformer stacks in their order of execution (down, mid, up), numbered from 0 as in
ComfyUI_IPAdapter_plus; the presets are defined as there. ``style`` and ``layout`` of SDXL were found by InstantStyle
(Wang et al. 2024).

A base's folder may have its own presets, ``presets.yaml``, which maps names to such mappings; they take precedence:

    style: {up_blocks.1: 1.0}
    composition: {mid_block: 1.0, down_blocks: 0.5}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from ipa.errors import UserError, brief

FILE = "presets.yaml"
FLOOR = 0.05  # smallest factor of an easing
WEAK = 0.2

# where λ enters a branch: the first multiplies its result, the others its keys and values
# (`ipa.families.cross_attention`)
SCALINGS = ("V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty")

Weights = dict[str, float]


@dataclass(frozen=True)
class BlockWeights:
    """Block → factor of λ. ``pushed`` blocks get the image in guidance's negative part, which pushes away from it."""

    shown: Weights
    pushed: Weights = field(default_factory=dict)


# shape of λ over the blocks: (number of the block, number of blocks, its part of the denoiser) → factor
CURVES: dict[str, Callable[[int, int, str], float]] = {
    "linear": lambda t, n, part: 1.0,
    "ease in": lambda t, n, part: FLOOR + (1 - FLOOR) * (1 - t / n),
    "ease out": lambda t, n, part: FLOOR + (1 - FLOOR) * t / n,
    "ease in-out": lambda t, n, part: FLOOR + (1 - FLOOR) * (1 - abs(t - n / 2) / (n / 2)),
    "reverse in-out": lambda t, n, part: FLOOR + (1 - FLOOR) * abs(t - n / 2) / (n / 2),
    "weak input": lambda t, n, part: WEAK if part == "down" else 1.0,
    "weak middle": lambda t, n, part: WEAK if part == "mid" else 1.0,
    "weak output": lambda t, n, part: WEAK if part == "up" else 1.0,
    "strong middle": lambda t, n, part: 1.0 if part == "mid" else WEAK,
}

# presets of the known denoisers, by their stacks in down, mid and up blocks: SDXL, and Stable Diffusion 1.x and 2.x;
# the second mapping, if there is one, is pushed away from
STYLE_SD, COMPOSITION_SD = dict.fromkeys([0, 1, 2, 3, *range(9, 16)], 1.0), {4: 0.25, 5: 1.0}
PRESETS: dict[tuple[int, ...], dict[str, tuple[dict[int, float], ...]]] = {
    (4, 1, 6): {
        "style": ({6: 1.0},),
        "composition": ({3: 1.0},),
        "strong style": (dict.fromkeys([0, 1, 2, *range(4, 11)], 1.0),),
        "style and composition": ({3: 1.0, 6: 1.0},),
        "style precise": ({6: 1.0}, {3: 1.0}),
        "composition precise": ({3: 1.0}, {t: 1.0 if t == 6 else 0.1 for t in range(11) if t != 3}),
    },
    (6, 1, 9): {
        "style": (STYLE_SD,),
        "composition": (COMPOSITION_SD,),
        "strong style": (dict.fromkeys([0, 1, 2, 3, *range(6, 16)], 1.0),),
        "style and composition": (STYLE_SD | COMPOSITION_SD,),
        "style precise": (STYLE_SD, COMPOSITION_SD),
        "composition precise": (COMPOSITION_SD, STYLE_SD | dict.fromkeys([6, 7, 8], 0.1)),
    },
}


def own_presets(base: str) -> dict[str, Mapping[str, float]]:
    """Those in the folder ``base``, by name; none for a hub id or a folder without. Raises UserError."""
    path = Path(base) / FILE
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not YAML: {brief(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise UserError(f"{path}: give a mapping of blocks to numbers for each name, as style: {{mid_block: 1.0}}")
    return {str(name): each for name, each in found.items()}


def curves_of(blocks: Sequence[str]) -> list[str]:
    """Those that these blocks have: only UNets have an input, a middle and an output."""
    is_unet = any(name.startswith("mid") for name in blocks)
    return [name for name in CURVES if is_unet or not name.startswith(("weak", "strong"))]


def named_presets(blocks: Sequence[str]) -> Mapping[str, tuple[dict[int, float], ...]]:
    parts = [name.partition("_")[0] for name in blocks]
    return PRESETS.get(tuple(parts.count(part) for part in ("down", "mid", "up")), {})


def preset_names(blocks: Sequence[str], own: Iterable[str] = ()) -> list[str]:
    return list(dict.fromkeys([*own, *curves_of(blocks), *named_presets(blocks)]))


def read_blocks(
    given: str | Mapping[str, float], blocks: Sequence[str], own: Mapping[str, Mapping[str, float]] | None = None
) -> BlockWeights:
    """A preset's name, or a mapping of blocks (or their first letters) to factors; raises UserError for others.

    ``own`` are the presets of the base's folder.
    """
    if own and isinstance(given, str) and given in own:
        given = own[given]
    if isinstance(given, Mapping):
        return BlockWeights(read_mapping(given, blocks))
    if not isinstance(given, str):
        raise UserError(f"blocks={given}: give a preset's name, or a mapping of blocks to numbers")
    if given in curves_of(blocks):
        numbered = enumerate(blocks)
        return BlockWeights({name: CURVES[given](t, len(blocks), name.partition("_")[0]) for t, name in numbered})
    shown, *pushed = named_presets(blocks).get(given, ({},))
    if not shown:
        names = ", ".join(preset_names(blocks, own or ()))
        raise UserError(
            f"blocks={given}: this base has the presets {names}; or give a mapping of its blocks {', '.join(blocks)}"
        )
    return BlockWeights(*({blocks[t]: factor for t, factor in each.items()} for each in (shown, *pushed)))


def read_mapping(given: Mapping[str, Any], blocks: Sequence[str]) -> Weights:
    weights = dict.fromkeys(blocks, 0.0)
    for prefix, factor in given.items():
        chosen = [name for name in blocks if name == prefix or name.startswith((f"{prefix}.", f"{prefix}_"))]
        if not chosen:
            raise UserError(f"blocks: {prefix} is none of {', '.join(blocks)}, nor the beginning of some")
        if not isinstance(factor, Real) or not isfinite(factor):
            raise UserError(f"blocks: {prefix}: {factor} is no number")
        weights |= dict.fromkeys(chosen, float(factor))
    return weights
