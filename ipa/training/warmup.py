"""λ grows at the beginning of a training, where a fresh adapter would change the base (Stable Diffusion 3)."""

from __future__ import annotations

from typing import Any

import lightning as L

from ipa.training.hooks import Order, TrainingCallback


class ScaleWarmup(TrainingCallback):
    """λ = step / ``num_steps`` in training, 1 from there on; 0 steps: always 1. It depends on the step alone."""

    order = Order.DATA

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.model.train_scale = min(1.0, trainer.global_step / self.num_steps) if self.num_steps else 1.0
