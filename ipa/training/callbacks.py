"""What happens around the steps: throughput, the guard of the frozen weights, the adapter file, the data position."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ipa.checkpoint import save_adapter
from ipa.export.published import check_readable_elsewhere, to_published


class Throughput(L.Callback):
    """Logs samples per second over all processes, measured between log steps, previews and checkpoints left out."""

    def __init__(self) -> None:
        self.samples = 0
        self.seconds = 0.0
        self.total_samples = 0
        self.total_seconds = 0.0
        self.started = math.nan

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        # the time since the last step's end is the wait for data, part of the cost; only callbacks' work is left out
        if math.isnan(self.started):
            self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += len(batch) * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.seconds = time.perf_counter() - self.started
            self.total_samples += self.samples
            self.total_seconds += self.seconds
            pl_module.log("train/samples_per_s", self.samples / self.seconds, prog_bar=True, rank_zero_only=True)
            self.samples, self.started = 0, math.nan

    @property
    def mean_samples_per_s(self) -> float:
        return self.total_samples / self.total_seconds if self.total_seconds else math.nan


class DataPosition(L.Callback):
    """Tells the datamodule which batch was consumed, so that a checkpoint holds the place to go on from."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        datamodule.consumed(batch)
        if trainer.global_step % trainer.log_every_n_steps == 0 and datamodule.rejects:  # type: ignore[attr-defined]
            counts = {f"data/rejected/{reason}": float(n) for reason, n in datamodule.rejects.items()}
            pl_module.log_dict(counts, rank_zero_only=True)


class FrozenGuard(L.Callback):
    """Hashes the frozen weights before and after training; raises RuntimeError if they changed."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.before = pl_module.model.frozen_hash()

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.model.frozen_hash() != self.before:
            raise RuntimeError("the frozen weights changed during training; the adapter file is not to be trusted")


class LossGuard(L.Callback):
    """Stops on a loss that is not finite, naming the step, the shards and the keys; nothing is repaired in silence."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not torch.isfinite(outputs["loss"]).all():
            shards = sorted(set(batch.shards))
            raise ValueError(f"the loss of step {trainer.global_step} is not finite; shards {shards}, keys {batch.keys}")


class ExportAdapter(L.Callback):
    """Writes the adapter file in the published layout at every ``every_n_steps`` and at the end of training."""

    def __init__(self, path: str | Path, every_n_steps: int, metadata: dict[str, Any], dtype: str = "float16") -> None:
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self.metadata = {name: str(value) for name, value in metadata.items()}
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.written_at = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        check_readable_elsewhere(pl_module.model.head)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.written_at != trainer.global_step:
            self.write(trainer, pl_module)

    def write(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            tensors = to_published(pl_module.model.trainable.state_dict(), self.dtype)
            save_adapter(self.path, tensors, {**self.metadata, "step": str(trainer.global_step)})
            self.written_at = trainer.global_step
