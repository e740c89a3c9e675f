"""Loggers: a CSV always, wandb as the dashboard, offline unless the user is logged in."""

from __future__ import annotations

import csv
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment


class ContinuedWriter(ExperimentWriter):
    """Lightning's writer, but what an earlier part of the run wrote is kept and continued."""

    NAME_METRICS_FILE = "log.csv"

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


class RunCSV(CSVLogger):
    """``log.csv`` straight in the run folder, one row per logged step; a resumed run goes on in the same file."""

    def __init__(self, folder: str | Path, flush_logs_every_n_steps: int = 50) -> None:
        super().__init__(Path(folder), name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    def log_dir(self) -> str:
        return str(self.root_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> ContinuedWriter:
        if self._experiment is None:
            self._experiment = ContinuedWriter(self.log_dir)
        return self._experiment


def make_wandb(folder: str | Path, project: str, name: str, **options: Any) -> WandbLogger:
    """A wandb run in ``folder``; it goes to the network only for a user who is logged in and did not say otherwise."""
    mode = os.environ.get("WANDB_MODE")
    offline = mode in ("offline", "dryrun") or (mode is None and not logged_in())
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_SILENT", "true")
    logger = WandbLogger(name=name, project=project, save_dir=str(folder), offline=offline, **options)
    logger._wandb_init.pop("anonymous", None)  # wandb warns of an option that Lightning always passes
    return logger


def logged_in() -> bool:
    """Whether wandb would find a key, without asking the network: the environment, or the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
