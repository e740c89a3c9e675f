"""Render the demo world's pictures into WebDataset shards in img2dataset's layout.

    python demo/make_data.py                      # writes demo/data/{train,heldout} and demo/build/data/{styles,judge}

Three public icon sets draw the same things in three styles. A caption names the thing only; the drawing style and the
background are left to the image prompt. Training pictures keep their transparency: the background is composed when a
sample is read (half white, half one of eleven plain colours). Held-out pictures, one per held-out concept, have style
and background cycled and baked in, so that every run validates on the same pixels.

``demo/data`` holds what the adapters learn from and is committed. ``demo/build/data/styles`` holds the training
concepts in two more styles, as far as these draw them, for the base and the encoder; ``demo/build/data/judge`` the
held-out ones in all styles, for the judge alone. Both are made anew where they are needed.

Needs npm (the sources are npm packages) unless ``--sources`` holds their unpacked folders.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent

# style name → npm package; the versions are pinned because shards must come out the same
STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
# further styles of the training concepts, for the base and the encoder; they lack some concepts, and a table of code
# points: their icons are named as those of the style in NAMED_AS, whose table is read
MORE_STYLES = {
    "gradient": "@iconify-json/fluent-emoji@1.2.7",
    "blob": "@iconify-json/noto-v1@1.2.5",
}
NAMED_AS = {"gradient": "fluent", "blob": "noto"}
NEW_STYLE = {"fxemoji": "@iconify-json/fxemoji@1.2.2"}  # of demo/make_style.py, which nothing here has seen
NAMES = "emojibase-data@17.0.0"

# the plain backgrounds that only an image prompt can name
BACKGROUNDS = {
    "white": "#ffffff",
    "black": "#1b1b1f",
    "grey": "#9aa0a6",
    "red": "#d93a3a",
    "orange": "#f08a24",
    "yellow": "#f6d743",
    "green": "#3fa45b",
    "teal": "#2fb5b0",
    "blue": "#3b6fd4",
    "purple": "#8450c4",
    "pink": "#f3a6c8",
    "brown": "#7d5a3c",
}

# emojibase groups and subgroups without a drawable thing of their own
LEFT_OUT_GROUPS = {"component", "flags"}
LEFT_OUT_SUBGROUPS = {"keycap", "alphanum", "family"}


@dataclass(frozen=True)
class Concept:
    """One thing with its caption and the SVG of each style."""

    hexcode: str
    caption: str
    group: str
    svgs: dict[str, str]


def unpack_sources(folder: Path, packages: Iterable[str] = (*STYLES.values(), *MORE_STYLES.values(), NAMES)) -> None:
    """Fetch the pinned npm packages into ``folder`` (a subfolder each), skipping those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        target = folder / package_folder(package)
        if target.exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        archive = folder / packed.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")


def package_folder(package: str) -> str:
    return package.lstrip("@").replace("/", "-").replace("@", "-")


def clean_caption(label: str) -> str:
    """``"person: beard"`` → ``"person beard"``: words only, as the small tokenizer reads them."""
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s-]", " ", label.lower())).strip()


def read_icons(folder: Path, table: Path | None = None) -> dict[str, str]:
    """Map code point → SVG for one icon set; aliases and mirrored icons are resolved.

    The code points are read from the icon set in ``table``, by default its own.
    """
    characters = json.loads(((table or folder) / "package" / "chars.json").read_text())
    sheet = json.loads((folder / "package" / "icons.json").read_text())
    width, height = sheet.get("width", 16), sheet.get("height", 16)
    svgs = {}
    for code, name in characters.items():
        mirrored = False
        while name in sheet.get("aliases", {}):
            mirrored ^= sheet["aliases"][name].get("hFlip", False)
            name = sheet["aliases"][name]["parent"]
        icon = sheet["icons"].get(name)
        if icon is None:
            continue
        w, h = icon.get("width", width), icon.get("height", height)
        body = f'<g transform="translate({w} 0) scale(-1 1)">{icon["body"]}</g>' if mirrored else icon["body"]
        svgs[join_code(code)] = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}">{body}</svg>'
    return svgs


def join_code(code: str) -> str:
    """The icon sets disagree on the variation selector; without it their code points meet."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_concepts(sources: Path) -> list[Concept]:
    """All things that every style of ``STYLES`` draws, in emojibase's order."""
    names = sources / package_folder(NAMES) / "package"
    meta = json.loads((names / "meta" / "groups.json").read_text())
    folders = {style: sources / package_folder(package) for style, package in (STYLES | MORE_STYLES).items()}
    icons = {style: read_icons(folder, folders[NAMED_AS.get(style, style)]) for style, folder in folders.items()}
    concepts = []
    for entry in json.loads((names / "en" / "data.json").read_text()):
        if "group" not in entry:
            continue
        group, subgroup = meta["groups"][str(entry["group"])], meta["subgroups"][str(entry["subgroup"])]
        code = join_code(entry["hexcode"])
        joined_person = group == "people-body" and "200d" in code
        clock_face = "o’clock" in entry["label"] or "-thirty" in entry["label"]
        if group in LEFT_OUT_GROUPS or subgroup in LEFT_OUT_SUBGROUPS or joined_person or clock_face:
            continue
        svgs = {style: found[code] for style, found in icons.items() if code in found}
        if STYLES.keys() <= svgs.keys():
            concepts.append(Concept(code, clean_caption(entry["label"]), group, svgs))
    return concepts


def render(svg: str, size_px: int) -> Image.Image:
    """RGBA picture of ``size_px`` × ``size_px`` with a margin of 1/16, so that every picture shows its background."""
    import resvg_py

    margin = size_px // 16
    inner = size_px - 2 * margin
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=inner, height=inner, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    canvas = Image.new("RGBA", (size_px, size_px))
    canvas.paste(picture, ((size_px - picture.width) // 2, (size_px - picture.height) // 2))
    return canvas


def on_background(picture: Image.Image, colour: str) -> Image.Image:
    canvas = Image.new("RGBA", picture.size, colour)
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")


def encode(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "WEBP", lossless=True, quality=100, method=6)
    return out.getvalue()


def draw_sample(job: tuple[Concept, str, str | None, int]) -> tuple[bytes, dict]:
    """One picture and its metadata; ``background`` None keeps the transparency."""
    concept, style, background, size_px = job
    picture = render(concept.svgs[style], size_px)
    if background is not None:
        picture = on_background(picture, BACKGROUNDS[background])
    metadata = {
        "caption": concept.caption,
        "url": f"{(STYLES | MORE_STYLES | NEW_STYLE)[style]}#{concept.hexcode}",
        "status": "success",
        "width": size_px,
        "height": size_px,
        "original_width": size_px,
        "original_height": size_px,
        "concept": concept.hexcode,
        "group": concept.group,
        "style": style,
        "background": background,
    }
    return encode(picture), metadata


def write_shards(folder: Path, jobs: list, samples_per_shard: int) -> None:
    """Write ``folder/00000.tar`` … in img2dataset's layout; the bytes depend on the jobs alone (mtime 0)."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        drawn = list(tqdm(pool.map(draw_sample, jobs, chunksize=16), total=len(jobs), desc=folder.name, unit="img"))
    for shard, start in enumerate(range(0, len(drawn), samples_per_shard)):
        samples = drawn[start : start + samples_per_shard]
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index, (webp, metadata) in enumerate(samples):
                key = f"{shard:05d}{index:04d}"
                metadata = {"key": key, **metadata}
                add_member(tar, f"{key}.json", json.dumps(metadata).encode())
                add_member(tar, f"{key}.txt", metadata["caption"].encode())
                add_member(tar, f"{key}.webp", webp)
        stats = {"count": len(samples), "successes": len(samples), "failed_to_download": 0, "failed_to_resize": 0}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4) + "\n")


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def split_concepts(concepts: list[Concept], heldout_fraction: float, seed: int) -> tuple[list[Concept], list[Concept]]:
    """Hold out the same share of every group; return (training, held out), each in shuffled order."""
    rng = random.Random(seed)
    training, heldout = [], []
    for group in sorted({concept.group for concept in concepts}):
        members = [concept for concept in concepts if concept.group == group]
        rng.shuffle(members)
        count = round(heldout_fraction * len(members))
        heldout += members[:count]
        training += members[count:]
    rng.shuffle(training)
    rng.shuffle(heldout)
    return training, heldout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder of the committed shards")
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder of what is not committed")
    parser.add_argument("--sources", type=Path, default=None, help="unpacked npm packages (default: BUILD/sources)")
    parser.add_argument("--size", type=int, default=64, help="edge of a picture in pixels")
    parser.add_argument("--heldout", type=float, default=0.1, help="share of all concepts that is held out")
    parser.add_argument("--samples-per-shard", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    sources = options.sources or options.build / "sources"
    unpack_sources(sources)
    training, heldout = split_concepts(read_concepts(sources), options.heldout, options.seed)
    print(f"{len(training)} training concepts, {len(heldout)} held out, {len(STYLES)} styles; {len(MORE_STYLES)} more")

    styles, backgrounds = list(STYLES), list(BACKGROUNDS)
    train_jobs = [(concept, style, None, options.size) for concept in training for style in styles]
    judge_jobs = [(concept, style, None, options.size) for concept in heldout for style in styles]
    style_jobs = [(c, style, None, options.size) for c in training for style in MORE_STYLES if style in c.svgs]
    heldout_jobs = [
        (concept, styles[i % len(styles)], backgrounds[i // len(styles) % len(backgrounds)], options.size)
        for i, concept in enumerate(heldout)
    ]
    write_shards(options.out / "train", train_jobs, options.samples_per_shard)
    write_shards(options.out / "heldout", heldout_jobs, options.samples_per_shard)
    write_shards(options.build / "data" / "styles", style_jobs, options.samples_per_shard)
    write_shards(options.build / "data" / "judge", judge_jobs, options.samples_per_shard)


if __name__ == "__main__":
    main()
