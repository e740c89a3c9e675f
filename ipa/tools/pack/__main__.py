"""Pack a folder of captioned pictures into shards that training reads.

    python -m ipa.tools.pack photos shards
    python -m ipa.tools.pack photos shards size=1024                      # shrink larger pictures, as JPEG
    python -m ipa.tools.pack photos shards captions=labels.csv caption_column=title
    python -m ipa.tools.pack after shards references=before               # pairs: before/NAME prompts after/NAME

Captions are read from .txt files next to the pictures, or from a table: JSON lines (metadata.jsonl, as in Hugging Face
datasets), CSV or parquet; its other columns become metadata, for filters. The shards have img2dataset's layout.
Repeat the command to resume an interrupted one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from ipa.tools.options import option, run_tool


@dataclass
class Options:
    folder: str = option(MISSING, "folder of pictures, subfolders included")
    out: str = option(MISSING, "folder for the shards")
    captions: str | None = option(None, "txt, none or a table; found automatically if there is only one source")
    path_column: str | None = option(None, "column of a table with the paths; default: file_name, path or image")
    caption_column: str | None = option(None, "column with the captions; default: text, caption or prompt")
    missing_caption: str = option("skip", "pictures without a usable caption", one_of=("skip", "empty", "error"))
    references: str | None = option(None, "folder with a reference of the same name for each picture")
    size: int | None = option(None, "shrink pictures whose shortest side is longer than this (px)", at_least=1)
    samples_per_shard: int = option(1000, "samples in a shard", at_least=1)
    shuffle: bool = option(True, "shuffle the pictures first; training shuffles only within a window")
    seed: int = option(0, "seed of the shuffling")
    workers: int | None = option(None, "processes that read and shrink; default: one per core", at_least=1)
    overwrite: bool = option(False, "replace shards that were packed from other files or with other options")


def run(options: Any) -> None:
    from ipa.tools.pack.shards import pack  # imports torch, which --help does not need

    pack(options)


def main() -> None:
    try:
        run_tool(sys.argv[1:], Options, run, __doc__, positional=("folder", "out"))
    except KeyboardInterrupt:
        sys.exit("pack: interrupted; finished shards are kept, and the same command resumes")


if __name__ == "__main__":
    main()
