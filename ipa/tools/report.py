"""Merge what an evaluation left into a table and a page that opens offline.

    python -m ipa.tools.report runs/evaluation/demo
    python -m ipa.tools.report folder=runs/evaluation/coco2017 rows=20 system=ip_adapter

Reads a benchmark's folder as `python evaluate.py` writes it and puts results.json, results.csv, table.md and
report.html there. Systems that were skipped or are not finished are in it with the reason. Run it again as often as
you like.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ipa.cli import quiet_libraries
from ipa.tools.options import run_tool


@dataclass
class Options:
    """What `python -m ipa.tools.report` takes, with the defaults."""

    folder: str = MISSING  # one benchmark's results
    rows: int = 12  # image prompts of the grid of pictures, drawn by lot
    seed: int = 0  # of that lot
    best: int = 6  # best and worst items, each
    system: str | None = None  # label of the system whose best and worst are shown; null: that of the highest CLIP-I
    thumbnail_px: int = 160  # longest edge of the pictures in the page
    limit_mb: float = 8.0  # what they may take; rows beyond are left out


def report(options: Any) -> Path:
    from ipa.evaluation.report.files import write_report
    from ipa.evaluation.report.page import Shown

    for name, least in (("rows", 0), ("best", 0), ("thumbnail_px", 16)):
        if options[name] < least:
            raise ValueError(f"{name}={options[name]}: at least {least}")
    shown = Shown(options.rows, options.seed, options.best, options.system, options.thumbnail_px, options.limit_mb)
    return write_report(Path(options.folder), shown)


def main() -> None:
    quiet_libraries()
    run_tool(sys.argv[1:], Options, report, __doc__, positional=("folder",))


if __name__ == "__main__":
    main()
