"""Render a style that nothing in the demo world has seen, for docs/finetuning.md and `make paper`.

    python demo/make_style.py          # writes demo/build/style/{20,100,500} and demo/data/unseen

Firefox OS's emoji (fxemoji) are a set of drawings that no model was trained on. The folders 20, 100 and 500 hold that
many of its pictures, each with those of the one before; ``unseen`` holds 100 others, with backgrounds baked in. All
have img2dataset's layout, as the shards of demo/make_data.py.

Needs npm unless ``--sources`` holds the unpacked packages.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from make_data import (
    BACKGROUNDS,
    HERE,
    NAMES,
    NEW_STYLE,
    Concept,
    clean_caption,
    package_folder,
    unpack_sources,
    write_shards,
)

SIZES, NUM_HELDOUT, SIZE_PX = (20, 100, 500), 100, 64
(STYLE,) = NEW_STYLE


def read_style(sources: Path) -> list[Concept]:
    """The drawings whose names are a label or a short code of emojibase, each concept once, in random order."""
    icons = json.loads((sources / package_folder(NEW_STYLE[STYLE]) / "package" / "icons.json").read_text())
    names, concepts = read_names(sources / package_folder(NAMES) / "package" / "en"), dict[str, Concept]()
    for name, icon in sorted(icons["icons"].items()):
        if label := names.get(letters(name)):
            width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            concepts.setdefault(label, Concept(name, clean_caption(label), "", {STYLE: svg}))
    found = list(concepts.values())
    random.Random(0).shuffle(found)
    return found


def read_names(folder: Path) -> dict[str, str]:
    """Letters of a label or a short code → the label."""
    labels = {entry["hexcode"]: entry["label"] for entry in json.loads((folder / "data.json").read_text())}
    names = {letters(label): label for label in reversed(labels.values())}
    for path in sorted((folder / "shortcodes").glob("*.json")):
        for code, short in json.loads(path.read_text()).items():
            for each in [short] if isinstance(short, str) else short:
                names.setdefault(letters(each), labels.get(code, ""))
    return names


def letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "build" / "style")
    parser.add_argument("--sources", type=Path, default=HERE / "build" / "sources")
    options = parser.parse_args()

    unpack_sources(options.sources, (NEW_STYLE[STYLE], NAMES))
    drawings = read_style(options.sources)
    heldout, training = drawings[:NUM_HELDOUT], drawings[NUM_HELDOUT:]
    colours = list(BACKGROUNDS)
    jobs = [(each, STYLE, colours[i % len(colours)], SIZE_PX) for i, each in enumerate(heldout)]
    write_shards(HERE / "data" / "unseen", jobs, NUM_HELDOUT)
    for size in SIZES:
        write_shards(options.out / str(size), [(each, STYLE, None, SIZE_PX) for each in training[:size]], size)
    print(f"{len(drawings)} drawings, {NUM_HELDOUT} held out")


if __name__ == "__main__":
    main()
