"""Progress: a bar with loss and samples per second on a terminal, otherwise a log line every minute."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import lightning as L
from tqdm import tqdm

from ipa.training.hooks import Order, TrainingCallback, is_due

log = logging.getLogger(__name__)

PAUSE_S = 60.0  # between two lines
SHOWN = {"train/loss": "loss", "train/samples_per_s": "samples/s"}  # logged name → shown name


class Progress(TrainingCallback):
    """Counts optimizer steps up to ``trainer.max_steps``, in a resumed run from where it resumes."""

    order = Order.PROGRESS

    def __init__(self, refresh_every_n_steps: int = 10) -> None:
        self.refresh_every_n_steps = refresh_every_n_steps
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.shown_at = time.monotonic()
        if trainer.global_step:
            log.info("resuming after step %d of %d", trainer.global_step, trainer.max_steps)
        if trainer.is_global_zero and sys.stderr.isatty():
            total, done = trainer.max_steps, trainer.global_step
            self.bar = tqdm(desc="training", total=total, initial=done, unit="step", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not is_due(trainer, batch_idx, self.refresh_every_n_steps):
            return
        step = trainer.global_step
        if self.bar is not None:
            self.bar.set_postfix_str(describe(trainer), refresh=False)
            self.bar.update(step - self.bar.n)
        if step == trainer.max_steps or time.monotonic() - self.shown_at >= PAUSE_S:
            level = logging.INFO if self.bar is None else logging.DEBUG  # only in train.log, not through the bar
            log.log(level, "step %d of %d  %s", step, trainer.max_steps, describe(trainer))
            self.shown_at = time.monotonic()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def describe(trainer: L.Trainer) -> str:
    """`loss 0.0123  samples/s 45.6`; Lightning would synchronise in every step for values logged with ``prog_bar``."""
    values = trainer.callback_metrics
    return "  ".join(f"{word} {float(values[name]):.4g}" for name, word in SHOWN.items() if name in values)
