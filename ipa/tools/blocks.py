"""Print the blocks of a base, in the order in which they run, and the factor of λ that each preset gives them.

    python -m ipa.tools.blocks base=demo/base
    python -m ipa.tools.blocks base=stabilityai/stable-diffusion-xl-base-1.0

Reads the configuration alone, no weights.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from ipa.presets import preset_names, read_blocks
from ipa.tools.options import option, run_tool


@dataclass
class Options:
    base: str = option(MISSING, "base model: diffusers folder or hub id")


def describe_blocks(options: Any) -> None:
    from ipa.families import family_of

    blocks = family_of(options.base, key="base").read_blocks(options.base)
    for number, name in enumerate(blocks):
        print(f"{number:3} {name}")
    for preset in preset_names(blocks):
        weights = read_blocks(preset, blocks)
        pushed = {name: -factor for name, factor in weights.pushed.items()}
        factors = " ".join(f"{(weights.shown | pushed).get(name, 0.0):5.2f}" for name in blocks)
        print(f"{preset:24} {factors}")
    print("\nNegative: the image takes part in guidance's negative part, which pushes away from it.")


def main() -> None:
    run_tool(sys.argv[1:], Options, describe_blocks, __doc__)


if __name__ == "__main__":
    main()
