"""How far training is: a bar with loss and samples per second on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from ipa.training.checkpointing import is_due

log = logging.getLogger(__name__)

MOST_LINES, LEAST_PAUSE_S = 100, 10.0
SHOWN = {"train/loss": "loss", "train/samples_per_s": "samples/s"}  # what is logged, and what it is called here


class Progress(ProgressBar):
    """Counts optimizer steps up to ``trainer.max_steps``, a resumed run from where it goes on."""

    def __init__(self, refresh_every_n_steps: int = 10) -> None:
        super().__init__()
        self.refresh_every_n_steps = refresh_every_n_steps
        self.enabled = True
        self.bar: tqdm | None = None
        self.told_step, self.told_at = 0, 0.0

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.told_step, self.told_at = trainer.global_step, time.monotonic()
        if self.enabled and sys.stderr.isatty():
            total, done = trainer.max_steps, trainer.global_step
            self.bar = tqdm(desc="training", total=total, initial=done, unit="step", dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.enabled or not is_due(trainer, batch_idx, self.refresh_every_n_steps):
            return
        step = trainer.global_step
        if self.bar is not None:
            self.bar.set_postfix_str(describe(trainer), refresh=False)
            self.bar.update(step - self.bar.n)
        elif step == trainer.max_steps or self.time_to_tell(trainer):
            log.info("step %d of %d  %s", step, trainer.max_steps, describe(trainer))
            self.told_step, self.told_at = step, time.monotonic()

    def time_to_tell(self, trainer: L.Trainer) -> bool:
        many = (trainer.global_step - self.told_step) * MOST_LINES >= trainer.max_steps
        return many and time.monotonic() - self.told_at >= LEAST_PAUSE_S

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def describe(trainer: L.Trainer) -> str:
    """`loss 0.0123  samples/s 45.6`; nothing is logged with ``prog_bar``, which Lightning fetches at every step."""
    values = trainer.callback_metrics
    return "  ".join(f"{word} {float(values[name]):.4g}" for name, word in SHOWN.items() if name in values)
