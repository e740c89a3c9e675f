"""Loggers: a CSV always, wandb as the dashboard, offline unless the user is logged in."""

from __future__ import annotations

import csv
import logging
import netrc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from uuid import NAMESPACE_URL, uuid5

import lightning as L
import numpy as np
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from omegaconf import OmegaConf
from PIL import Image

from ipa.errors import UserError
from ipa.files import write_atomically
from ipa.secrets import without_secrets

log = logging.getLogger(__name__)


class ContinuedWriter(ExperimentWriter):
    """Lightning's writer, but with one row per step, and what an earlier part of the run wrote is continued."""

    NAME_METRICS_FILE = "log.csv"
    written: int | None = None  # the step of the last row of an earlier part of the run

    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the file here."""

    def continue_after(self, step: int, row: dict[str, float]) -> None:
        """Drop the rows of later steps, which are run again; ``row`` is this step's, if it should be missing."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            self.metrics_keys, found = read_rows(path)
            rows = [row for row in found if int(row["step"]) <= step]
            self._write(rows)
            self.written = int(rows[-1]["step"]) if rows else None
            if row and self.written != step:
                self.log_metrics(row, step)
                self.save()
                self.written = step

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        if step is not None and step == self.written:
            self._add_to_last_row(metrics_dict)
            return
        super().log_metrics(metrics_dict, step)
        if len(self.metrics) > 1 and self.metrics[-2]["step"] == self.metrics[-1]["step"]:
            last = self.metrics.pop()
            self.metrics[-1].update(last)

    def _add_to_last_row(self, values: dict[str, float]) -> None:
        """What an earlier part of the run did not come to, as its last preview, belongs into the row that it wrote."""
        with open(self.metrics_file_path, newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        self.metrics_keys = sorted({*self.metrics_keys, *values})  # as Lightning's writer keeps them
        rows[-1].update(values)
        self._write(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        self._write(rows)

    def _write(self, rows: list[dict[str, str]]) -> None:
        write_atomically(Path(self.metrics_file_path), lambda beside: self._write_to(beside, rows))

    def _write_to(self, path: Path, rows: list[dict[str, str]]) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows; what a full disk tore off in the middle is none. Raises UserError for another file."""
    whole = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
    reader = csv.DictReader(whole.split("\n"))
    rows = [row for row in reader if (row.get("step") or "").isdecimal() and None not in row]
    names = list(reader.fieldnames or [])
    if names and "step" not in names:
        raise UserError(f"{path} is damaged: it has no column step. Move it away, and the same command goes on")
    return names, rows


class RunCSV(CSVLogger):
    """``log.csv`` straight in the run folder, one row per logged step; a resumed run goes on in the same file."""

    def __init__(self, folder: str | Path) -> None:
        # the trainer saves after every logged step; the logger by itself would tear the rows of a step apart
        super().__init__(Path(folder), name="", version="", flush_logs_every_n_steps=sys.maxsize)

    @property
    def log_dir(self) -> str:
        return str(self.root_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> ContinuedWriter:
        if self._experiment is None:
            self._experiment = ContinuedWriter(self.log_dir)
        assert isinstance(self._experiment, ContinuedWriter)
        return self._experiment


class ContinuedLog(L.Callback):
    """Lets ``log.csv`` go on at the step where training goes on.

    A kill may come long after the last checkpoint, or between the checkpoint and the row of its step, which Lightning
    writes after all callbacks. So the checkpoint has that row, too.
    """

    def __init__(self) -> None:
        self.row: dict[str, float] = {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["log_row"] = row_to_come(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.row = checkpoint["log_row"]

    def on_ready(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunCSV) and trainer.is_global_zero:
                logger.experiment.continue_after(trainer.global_step, self.row)


def row_to_come(trainer: Any) -> dict[str, float]:
    """What `log.csv` gets of the step that was just made; nothing where the step is not logged."""
    if trainer.global_step == 0 or trainer.global_step % trainer.log_every_n_steps:
        return {}
    told = {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items() if name != "step"}
    for logger in trainer.loggers:
        if isinstance(logger, RunCSV) and trainer.is_global_zero and logger.experiment.metrics:
            held = logger.experiment.metrics[-1]
            told |= held if held["step"] == trainer.global_step else {}
    told.pop("step", None)
    return told


class RunWandb(WandbLogger):
    """wandb's logger, for a run that outlives wandb's service: a signal to all processes of a job ends that first."""

    lost = False

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_metrics, *args, **kwargs)

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_image, *args, **kwargs)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_table, *args, **kwargs)

    def attempt(self, tell: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """What it misses is in log.csv and previews/; told once."""
        import wandb

        if self.lost:
            return
        try:
            tell(*args, **kwargs)
        except (ConnectionError, wandb.Error) as error:
            self.lost = True
            log.warning("wandb's service has ended (%s): its record of this run stops here, log.csv goes on", error)


def make_wandb(folder: str | Path, project: str, name: str, **options: Any) -> WandbLogger:
    """A wandb run in ``folder``; it goes to the network only for a user who is logged in and did not say otherwise.

    The run's id is the folder's, so that a resumed training goes on in the same run (offline: in a further file of it,
    which `wandb sync` puts behind the first). What wandb would lay in the home folder, tables that it stages among it,
    stays in the run's.
    """
    mode = os.environ.get("WANDB_MODE")
    offline = mode in ("offline", "dryrun") or (mode is None and not logged_in())
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # else a killed run loses 15 s of its log
    for kind in ("DATA", "CACHE"):
        os.environ.setdefault(f"WANDB_{kind}_DIR", str(Path(folder).resolve() / "wandb" / kind.lower()))
    run_id = uuid5(NAMESPACE_URL, Path(folder).resolve().as_uri()).hex
    options = {"id": run_id, "resume": "allow", **options}
    logger = RunWandb(name=name, project=project, save_dir=str(folder), offline=offline, **options)
    logger._wandb_init.pop("anonymous", None)  # wandb warns of an option that Lightning always passes
    return logger


def make_tensorboard(folder: str | Path) -> TensorBoardLogger:
    """TensorBoard's files in ``folder``; raises UserError when the package is missing."""
    try:
        return TensorBoardLogger(Path(folder), name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise UserError("logger=tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'") from error


def log_picture(logger: Any, name: str, picture: Image.Image, step: int) -> None:
    """Show a picture on the dashboard, where the logger is one."""
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [picture], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")


def log_now(trainer: L.Trainer, values: dict[str, float]) -> None:
    """To the loggers at this step alone: what ``pl_module.log`` was told it repeats in the rows of later steps."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def log_configuration(logger: Any, configuration: dict[str, Any]) -> None:
    """Show what a run was asked for on the dashboard, where the logger is one; secrets stay in the run's folder."""
    public = without_secrets(configuration)
    if isinstance(logger, WandbLogger):
        logger.log_hyperparams(public)
    elif isinstance(logger, TensorBoardLogger):
        text = OmegaConf.to_yaml(OmegaConf.create(public))
        logger.experiment.add_text("configuration", "\n".join(f"    {line}" for line in text.splitlines()))


def logged_in() -> bool:
    """Whether wandb would find a key, without asking the network: the environment, or the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
