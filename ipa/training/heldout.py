"""Held-out samples watch a fine-tuning: when it stops learning, and when it only remembers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L

from ipa.data.order.lanes import Share
from ipa.errors import UserError
from ipa.training.callbacks import ExportAdapter
from ipa.training.hooks import TrainingCallback, callbacks_of, is_due
from ipa.training.loggers import log_now
from ipa.training.monitors import NUM_STANDARD_ERRORS, ImagePromptGuard, compare_images
from ipa.types import Batch

log = logging.getLogger(__name__)


class HeldOutGap(TrainingCallback):
    """Measures `image_prompt/gap` on held-out samples (``data.val``), with the weights of the adapter file.

    Every ``every_n_steps`` (null: never) the first ``num_samples`` are predicted with their own references and with
    their neighbours', always at the same noise and times, on all ranks. The weights with the largest gap are kept in
    ``path``. After ``patience`` measurements without a larger one the run ends; null never ends it.
    `image_prompt/overfit` is the mean gap of the last training samples (`ImagePromptGuard`) minus the held-out one. It
    warns once when the held-out gap is below ``alarm`` times that one, and two standard errors below it.
    """

    def __init__(
        self,
        path: str | Path,
        every_n_steps: int | None = None,
        num_samples: int = 64,
        patience: int | None = None,
        alarm: float = 0.5,
    ) -> None:
        self.path, self.export = Path(path), ExportAdapter(path, every_n_steps=0)
        self.every_n_steps, self.num_samples = every_n_steps, num_samples
        self.patience, self.alarm = patience, alarm
        self.batches: list[Batch] = []
        self.best: dict[str, Any] = {"step": 0, "gap": None, "without": 0, "warned": False}

    @property
    def has_stopped(self) -> bool:
        return self.patience is not None and self.best["without"] >= self.patience

    def on_ready(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Read the samples; raises UserError if there are none."""
        if self.every_n_steps is None:
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader, found = datamodule.val_dataloader(Share()), 0
        for batch in loader:
            self.batches += [batch] * (len(batch) > 1)  # one sample has no neighbour
            found += len(batch)
            if found >= self.num_samples:
                break
        if not self.batches:
            raise UserError(
                "heldout_check.every_n_steps measures held-out samples: give data.val=SHARDS with two or more"
            )
        for batch in self.batches:
            pl_module.model.family.check_texts(batch.text)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.every_n_steps is None or not is_due(trainer, batch_idx, self.every_n_steps):
            return
        gap = self.measure(trainer, pl_module)
        values = {"heldout_gap": gap}
        for guard in [each for each in callbacks_of(trainer, ImagePromptGuard) if each.gaps]:
            values["overfit"] = guard.mean_gap()[0] - gap
            self.judge(guard, gap, trainer.global_step)
        log_now(trainer, {f"image_prompt/{name}": value for name, value in values.items()})
        self.keep(gap, trainer, pl_module)

    def measure(self, trainer: L.Trainer, pl_module: Any) -> float:
        model, total_own, total_other = pl_module.model, 0.0, 0.0
        with pl_module.product(), trainer.precision_plugin.forward_context(), model.eagerly():
            for batch in self.batches:
                own, other = compare_images(model, batch.to(pl_module.device))
                total_own, total_other = total_own + own * len(batch), total_other + other * len(batch)
        return (total_other - total_own) / total_own

    def judge(self, guard: ImagePromptGuard, heldout: float, step: int) -> None:
        """Warn once, if the training samples' gap is much larger, and not by its scatter."""
        training, error = guard.mean_gap()
        is_sure = guard.has_patience_ended and training - NUM_STANDARD_ERRORS * error > heldout
        if self.best["warned"] or not (is_sure and self.alarm * training > heldout):
            return
        self.best["warned"] = True
        log.warning(
            "step %d: the adapter overfits: another image's reference raises the loss of training samples by %.2f %%, "
            "of held-out ones by only %.2f %%. Stop here (the best weights are in %s), add data, or try a lower "
            "optimizer.lr, adapter.freeze=branches or a share of general data",
            *(step, 100 * training, 100 * heldout, self.path),
        )

    def keep(self, gap: float, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the weights if they are the best so far; else end the run if its patience is at its end."""
        if self.best["gap"] is None or gap > self.best["gap"]:
            self.best |= {"step": trainer.global_step, "gap": gap, "without": 0}
            with pl_module.product():
                self.export.write(pl_module, self.path)
            return
        self.best["without"] += 1
        if self.has_stopped:
            log.info("the held-out gap has not grown since step %d: stopping early", self.best["step"])
            end_here(trainer)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.best)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best |= state_dict


def end_here(trainer: Any) -> None:
    """Make this step the last one, so that all that is done at the end is done after it. A test checks the name."""
    trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
