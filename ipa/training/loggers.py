"""Loggers: always ``log.csv``; wandb as the dashboard, offline unless the user is logged in."""

from __future__ import annotations

import csv
import logging
import netrc
import os
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from uuid import NAMESPACE_URL, uuid5

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from PIL import Image

from ipa.errors import UserError, brief
from ipa.files import write_atomically
from ipa.secrets import without_secrets
from ipa.training.hooks import TrainingCallback

WANDB_MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")
# of wandb at its start and end; what is not uploaded by then stays in the run's folder
INIT_S, FINISH_S = 20, 60

log = logging.getLogger(__name__)


class RunCSV(Logger):
    """``log.csv`` in the run's folder, one row per logged step, appended.

    A row is kept in memory until the trainer saves or a later step is logged. A new column rewrites the file.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "log.csv"
        self.columns: list[str] = []
        self.row: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run's folder has its configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        if self.row.get("step") != step:
            self.save()
        self.row |= {**metrics, "step": int(step)}

    @rank_zero_only
    def save(self) -> None:
        if not self.row:
            return
        if new := sorted({*self.row} - {*self.columns}):
            rows = read_rows(self.path) if self.columns else []
            self.columns += new if self.columns else ["step", *(name for name in new if name != "step")]
            self.rewrite(rows)
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(self.row)
        except OSError as error:
            raise UserError(f"could not write {self.path} ({brief(error)}): free some space, then resume") from error
        self.row = {}

    def rewrite(self, rows: list[dict[str, str]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.path, write)

    def resume(self, step: int, row: dict[str, float]) -> None:
        """Cut the rows after ``step``, which will be repeated.

        The row of ``step`` is taken back into memory, with the values of ``row``, the checkpoint's copy: a kill may
        have come before it was written, or before the preview of that step.
        """
        if not self.path.is_file():
            return
        rows = [each for each in read_rows(self.path) if int(each["step"]) <= step]
        self.columns = list(rows[0]) if rows else []
        last = rows.pop() if rows and int(rows[-1]["step"]) == step else {}
        if row or last:
            self.row = {**{name: value for name, value in last.items() if value}, **row, "step": step}
        self.rewrite(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows; the last may have been cut off by a full disk. Raises UserError for another file."""
    whole = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
    reader = csv.DictReader(whole.split("\n"))
    if reader.fieldnames and "step" not in reader.fieldnames:
        raise UserError(f"{path} is damaged: it has no column step. Move it away, then run the same command")
    return [row for row in reader if (row.get("step") or "").isdecimal() and None not in row]


class LogPosition(TrainingCallback):
    """Resumes ``log.csv`` at the step where training resumes.

    Lightning logs a step after all callbacks, so a checkpoint also holds the row of its own step.
    """

    def __init__(self) -> None:
        self.row: dict[str, float] = {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["log_row"] = row_of_step(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.row = checkpoint["log_row"]

    def on_ready(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunCSV) and trainer.is_global_zero:
                logger.resume(trainer.global_step, self.row)


def row_of_step(trainer: Any) -> dict[str, float]:
    """What ``log.csv`` gets for the step that was just made; empty if the step is not logged."""
    if trainer.global_step == 0 or trainer.global_step % trainer.log_every_n_steps:
        return {}
    row = {name: float(value) for name, value in trainer.logged_metrics.items()}
    for logger in trainer.loggers:
        if isinstance(logger, RunCSV) and logger.row.get("step") == trainer.global_step:
            row |= logger.row
    row.pop("step", None)
    return row


class RunWandb(WandbLogger):
    """wandb's logger; the run continues if wandb fails: ``log.csv`` and ``previews/`` have the same data."""

    lost = False

    @property
    def experiment(self) -> Any:
        """wandb's run: offline if that does not start online, and none if that does not start either."""
        import wandb

        try:
            return super().experiment
        except Exception as error:  # of many libraries
            if self._wandb_init.get("mode") == "disabled":
                raise
            self._wandb_init["mode"] = "disabled" if self._wandb_init.get("mode") == "offline" else "offline"
            log.warning("wandb does not start (%s): it is %s now", brief(error), self._wandb_init["mode"])
            wandb.teardown()  # or the id is in use
            return self.experiment

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_metrics, *args, **kwargs)

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_image, *args, **kwargs)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_hyperparams, *args, **kwargs)

    def log_summary(self, values: dict[str, float]) -> None:
        """Values of the whole run, in its overview."""
        self.attempt(lambda: self.experiment.summary.update(values))

    def attempt(self, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Warn once. A signal to all processes ends wandb's service first."""
        try:
            if not self.lost:
                call(*args, **kwargs)
        except Exception as error:
            self.lost = True
            log.warning("wandb's service has ended (%s): its record of this run stops, log.csv continues", brief(error))


def make_wandb(folder: str | Path, project: str, name: str, **options: Any) -> WandbLogger:
    """A wandb run in ``folder``; online only for a user who is logged in and did not choose otherwise.

    The id of the run comes from its folder, so a resumed training continues the same wandb run (offline: another file,
    which `wandb sync` appends). Raises UserError for settings that wandb does not have.
    """
    mode = os.environ.get("WANDB_MODE")
    check_wandb(mode, project, options)
    offline = mode in ("offline", "dryrun") or (mode is None and not logged_in())
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # a killed run would lose 15 s of its log
    os.environ.setdefault("WANDB_INIT_TIMEOUT", str(INIT_S))
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_S))
    for kind in ("DATA", "CACHE"):
        os.environ.setdefault(f"WANDB_{kind}_DIR", str(Path(folder).resolve() / "wandb" / kind.lower()))
    run_id = uuid5(NAMESPACE_URL, Path(folder).resolve().as_uri()).hex
    options = {"id": run_id, "resume": "allow", **options}
    logger = RunWandb(name=name, project=project, save_dir=str(folder), offline=offline, **options)
    logger._wandb_init.pop("anonymous", None)  # Lightning always passes it, and wandb warns of it
    return logger


def check_wandb(mode: str | None, project: str, options: Mapping[str, Any]) -> None:
    import wandb

    if mode not in (None, *WANDB_MODES):
        raise UserError(f"WANDB_MODE={mode}: give one of {', '.join(WANDB_MODES)}")
    if not isinstance(project, str) or not 0 < len(project) <= 128 or set(project) & set("/\\#?%:"):
        raise UserError(f"logger.wandb.project={project}: give up to 128 characters without / \\ # ? % :")
    known = {name for call in (wandb.init, WandbLogger.__init__) for name in signature(call).parameters}
    if unknown := sorted(set(options) - known):
        raise UserError(f"logger.wandb has no option {', '.join(unknown)}: it takes those of wandb.init")


def make_tensorboard(folder: str | Path) -> TensorBoardLogger:
    """TensorBoard's files in ``folder``; raises UserError if the package is missing."""
    try:
        return TensorBoardLogger(Path(folder), name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise UserError("logger=tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'") from error


def log_picture(logger: Any, name: str, picture: Image.Image, step: int) -> None:
    """Show an image on the dashboard, if the logger is one."""
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [picture], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")


def log_now(trainer: L.Trainer, values: dict[str, float]) -> None:
    """Log values at this step only; Lightning repeats values of ``pl_module.log`` at later steps."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def log_scores(logger: Any, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Show the final scores on the dashboard, if the logger is one."""
    values = {f"scores/{row}/{name}": value for row, of_row in scores.items() for name, value in of_row.items()}
    if isinstance(logger, RunWandb):
        logger.log_summary(values)
    elif isinstance(logger, TensorBoardLogger):
        logger.log_metrics(values)


def log_configuration(logger: Any, configuration: dict[str, Any]) -> None:
    """Show the configuration on the dashboard, if the logger is one, without secrets."""
    public = without_secrets(configuration)
    if isinstance(logger, WandbLogger):
        logger.log_hyperparams(public)
    elif isinstance(logger, TensorBoardLogger):
        text = OmegaConf.to_yaml(OmegaConf.create(public))
        logger.experiment.add_text("configuration", "\n".join(f"    {line}" for line in text.splitlines()))


def logged_in() -> bool:
    """Whether wandb would find a key in the environment or the netrc file; the network is not asked."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
