"""Pack a folder of pictures with captions into shards that training reads.

    python -m ipa.tools.pack photos shards
    python -m ipa.tools.pack photos shards size=1024                             # shrink what is larger, as JPEG
    python -m ipa.tools.pack photos shards captions=labels.csv caption_column=title
    python -m ipa.tools.pack after shards references=before                      # pairs: before/NAME prompts after/NAME

Captions are in ``.txt`` files of the pictures' names or in a table: ``metadata.jsonl`` as Hugging Face has it, CSV or
parquet. Other columns of a table go into the metadata, for filters. Pictures are copied byte for byte. The layout is
img2dataset's. What was interrupted goes on with the same command.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ipa.errors import UserError
from ipa.tools.options import option, run_tool

UNCAPTIONED = ("skip", "empty", "error")
# these change nothing in what a shard holds
NEUTRAL = ("out", "workers", "overwrite")


@dataclass
class Options:
    folder: str = option(MISSING, "folder with the images, also in subfolders")
    out: str = option(MISSING, "folder for the shards")
    captions: str | None = option(None, "txt, none, or a table; null: the only source of captions in the folder")
    path_column: str | None = option(None, "column of the table with the paths; null: file_name, path or image")
    caption_column: str | None = option(None, "column of the table with the captions; null: text, caption or prompt")
    missing_caption: str = option("skip", "what to do with images without a caption", one_of=UNCAPTIONED)
    references: str | None = option(None, "folder with a reference image of the same name for each image")
    size: int | None = option(None, "shrink images whose shortest side is longer than this (px)", at_least=1)
    samples_per_shard: int = option(1000, "samples per shard", at_least=1)
    shuffle: bool = option(True, "shuffle all samples; training only shuffles locally, and folders are often sorted")
    seed: int = option(0, "seed of the shuffle")
    workers: int | None = option(None, "number of processes; null: one per core", at_least=1)
    overwrite: bool = option(False, "overwrite existing shards")


def check_options(options: Any) -> None:
    if Path(options.out).exists() and not Path(options.out).is_dir():
        raise UserError(f"out={options.out} is a file; the shards need a folder")


def pack(options: Any) -> None:
    """Pack what is not packed yet and tell what came of it; raises UserError with a message."""
    check_options(options)
    from ipa.tools.packing.shards import missing
    from ipa.tools.packing.workers import write_shards

    contents = read_contents(options)
    say(contents.notes)
    shards = plan(contents.samples, options)
    todo = missing(Path(options.out), shards, options.overwrite)
    if len(todo) < len(shards):
        say([f"{len(shards) - len(todo)} of {len(shards)} shards are there already"])
    write_shards(todo, options.workers or cores())
    say(summary(options, [shard.path for shard in shards], contents.left_out))


def say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def cores() -> int:
    """As many as this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_contents(options: Any) -> Any:
    from ipa.tools.packing.captions import find_captions
    from ipa.tools.packing.contents import Contents, find_references
    from ipa.tools.packing.folders import Folder
    from ipa.tools.packing.tables import Columns

    references = None
    folder = Folder.read(Path(options.folder), "folder", besides=options.references)
    if options.references is not None:
        references = find_references(Folder.read(Path(options.references), "references"), folder.pictures)
    columns = Columns(options.path_column, options.caption_column)
    captions = find_captions(folder, options.captions, columns, may_lack=options.missing_caption == "empty")
    return Contents.collect(folder, captions, references, options.missing_caption)


def plan(samples: Sequence[Any], options: Any) -> list[Any]:
    """Samples, shuffled, dealt to shards. Borders and order depend on the list of samples alone."""
    from ipa.tools.packing.samples import Making
    from ipa.tools.packing.shards import Shard

    ordered = list(samples)
    if options.shuffle:
        random.Random(options.seed).shuffle(ordered)
    references = Path(options.references) if options.references else None
    making = Making(Path(options.folder), references, options.size, any(len(sample.captions) > 1 for sample in samples))
    told = {name: value for name, value in options.items() if name not in NEUTRAL}
    starts = range(0, len(ordered), options.samples_per_shard)
    parts = [ordered[start : start + options.samples_per_shard] for start in starts]
    return [Shard(Path(options.out, f"{n:05d}.tar"), part, making, told) for n, part in enumerate(parts)]


def summary(options: Any, shards: Sequence[Path], left_out: Mapping[str, list[str]]) -> list[str]:
    """What lies in the shards, what does not, and what to do next; raises UserError if they are all empty."""
    from ipa.tools.packing.folders import examples
    from ipa.tools.packing.shards import read_stats

    stats = [read_stats(shard) for shard in shards]
    failed = {reason: list(names) for reason, names in left_out.items()}
    for each in stats:
        for reason, names in each["failed"].items():
            failed.setdefault(reason, []).extend(names)
    pictures = sum(each["successes"] for each in stats)
    lines = [f"left out, {reason}: {examples(sorted(names))}" for reason, names in failed.items()]
    if not pictures:
        raise UserError("; ".join(["none of the pictures could be packed", *lines]))
    size = sum(each["tar_bytes"] for each in stats)
    what = f"{options.out}: {pictures:,} pictures, shards: {len(shards):,}, {size / 1e6:,.1f} MB"
    extensions = {extension for each in stats for extension in each["extensions"]}
    return [*lines, what, f"next: {next_command(options.out, extensions)}"]


def next_command(out: str, extensions: Iterable[str]) -> str:
    """A training on the shards, as shell and Hydra both read it."""
    from ipa.tools.packing.samples import REFERENCE

    value = out if re.fullmatch(r"[\w./-]+", out, re.ASCII) else f'"{out}"'
    words = ["experiment=decoupled_global", "recipe=sd15", f"data.train={value}"]
    references = sorted(extension for extension in extensions if extension.startswith(f"{REFERENCE}."))
    if references:
        words.append(f"data.reference=[{','.join(references)}]")
    return shlex.join(["python", "train.py", *words])


def main() -> None:
    try:
        run_tool(sys.argv[1:], Options, pack, __doc__, positional=("folder", "out"))
    except KeyboardInterrupt:
        sys.exit("pack: interrupted. What is whole is kept, the same command goes on.")


if __name__ == "__main__":
    main()
