"""What happens around the steps: throughput, the adapter file, the data position."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ipa.checkpoint import save_adapter
from ipa.export.published import to_published, with_metadata
from ipa.training.checkpointing import check_finite, is_due
from ipa.training.strategies import whole


class Throughput(L.Callback):
    """Logs samples per second over all processes, measured between log steps.

    What other callbacks do at every ``pause_every_n_steps``, previews and checkpoints, is left out.
    """

    def __init__(self, pause_every_n_steps: int = 0) -> None:
        self.pause_every_n_steps = pause_every_n_steps
        self.samples = 0
        self.seconds = 0.0
        self.total_samples = 0
        self.total_seconds = 0.0
        self.started = math.nan

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # the time since the last step's end is the wait for data, part of the cost; only callbacks' work is left out
        if math.isnan(self.started):
            self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += len(batch) * trainer.world_size
        logs = is_due(trainer, batch_idx, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if logs or is_due(trainer, batch_idx, self.pause_every_n_steps):
            self.seconds += time.perf_counter() - self.started
            self.started = math.nan
        if logs:
            pl_module.log("train/samples_per_s", self.samples / self.seconds, rank_zero_only=True)
            self.total_samples += self.samples
            self.total_seconds += self.seconds
            self.samples, self.seconds = 0, 0.0

    @property
    def mean_samples_per_s(self) -> float:
        return self.total_samples / self.total_seconds if self.total_seconds else math.nan


class DataPosition(L.Callback):
    """Tells the datamodule which batch was consumed, so that a checkpoint holds the place to go on from.

    ``rejects`` counts by reason what all ranks skipped up to the last log step, which the last step is.
    """

    def __init__(self) -> None:
        self.rejects: Counter[str] = Counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        datamodule.consumed(batch)
        if is_due(trainer, batch_idx, trainer.log_every_n_steps):  # type: ignore[attr-defined]
            self.rejects = datamodule.all_rejects()
            counts = {f"data/rejected/{reason}": float(n) for reason, n in self.rejects.items()}
            pl_module.log_dict(counts, rank_zero_only=True)


class ExportAdapter(L.Callback):
    """Writes the adapter file at every ``every_n_steps`` and at the last step, for the readers of ``layout``.

    It holds the averaged weights when there is an average, and the raw ones then lie beside it as ``*_raw``.
    """

    def __init__(self, path: str | Path, every_n_steps: int, layout: str = "diffusers", dtype: str = "float16") -> None:
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self.layout = layout
        self.dtype: torch.dtype = getattr(torch, dtype)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_due(trainer, batch_idx, self.every_n_steps):
            with pl_module.product():
                self.write(pl_module, self.path)
            if pl_module.average is not None:
                self.write(pl_module, self.path.with_stem(f"{self.path.stem}_raw"))

    def write(self, pl_module: Any, path: Path) -> None:
        """Called by all ranks, which put the weights together; the first writes."""
        tensors = to_published(whole(pl_module.model.trainable.state_dict()), self.dtype)
        check_finite(tensors, pl_module.global_step)
        if pl_module.global_rank == 0:
            save_adapter(path, tensors, with_metadata(tensors, pl_module.describe()))
