"""Write a table and a page, which opens offline, from the results of an evaluation.

    python -m ipa.tools.report runs/evaluation/demo
    python -m ipa.tools.report folder=runs/evaluation/coco2017 rows=20 system=ip_adapter
    python -m ipa.tools.report runs/evaluation/demo wandb=ipa        # log them to this wandb project, too

Reads a benchmark's folder as `python evaluate.py` writes it, and writes table.md and report.html into it; each system's
scores.json has the same values. Systems that were skipped or are not finished are listed with the reason.
wandb=PROJECT logs the table and the images of the grid as one run named after the folder: offline, into FOLDER/wandb,
unless you are logged in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ipa.cli import quiet_libraries
from ipa.tools.options import option, tool


@dataclass
class Options:
    folder: str = option(MISSING, "folder with a benchmark's results")
    rows: int = option(12, "image prompts of the grid, sampled at random", at_least=0)
    seed: int = option(0, "seed of this sample")
    best: int = option(6, "number of best and of worst items", at_least=0)
    system: str | None = option(None, "label of the system that they are from; null: the one with the highest CLIP-I")
    thumbnail_px: int = option(160, "longest edge of the images on the page", at_least=16)
    wandb: str | None = option(None, "wandb project to log the tables to; null: none")


def report(options: Any) -> Path:
    from ipa.evaluation.report.files import write_report
    from ipa.evaluation.report.page import Shown

    quiet_libraries()
    shown = Shown(options.rows, options.seed, options.best, options.system, options.thumbnail_px)
    page = write_report(Path(options.folder), shown)
    if options.wandb is not None:
        show(Path(options.folder), options.wandb, shown)
    return page


def show(folder: Path, project: str, shown: Any) -> None:
    """Log the report to a wandb project; a folder is one run, however often it is logged."""
    from ipa.evaluation.report.files import log_report
    from ipa.evaluation.report.reading import read_evaluation
    from ipa.training.loggers import make_wandb

    logger = make_wandb(folder, project, folder.resolve().name, job_type="evaluation")
    log_report(logger, read_evaluation(folder), shown)


main = tool(Options, report, __doc__, positional=("folder",))

if __name__ == "__main__":
    main()
