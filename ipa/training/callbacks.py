"""What happens around the steps: throughput, the adapter file, the data position."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ipa.errors import brief
from ipa.export.published import to_published, with_metadata
from ipa.export.storage import save_adapter
from ipa.training.checkpointing import check_finite, ends_step, is_due
from ipa.training.flops import count_flops, peak_flops
from ipa.training.profiling import FETCH, StepClock
from ipa.training.strategies import whole

log = logging.getLogger(__name__)


class Throughput(L.Callback):
    """Logs samples per second over all processes, and this one's mean step and wait for data, between log steps.

    What other callbacks do at every ``pause_every_n_steps``, previews and checkpoints, is left out. On a CUDA device
    the model-FLOP utilisation, too: FLOPs that the steps needed (see ``count_flops``, asked once, as batches are alike)
    over what the card could do in the same time at best.
    """

    def __init__(self, pause_every_n_steps: int = 0) -> None:
        self.pause_every_n_steps = pause_every_n_steps
        self.samples, self.steps = 0, 0
        self.seconds, self.waited_s = 0.0, 0.0
        self.total_samples = 0
        self.total_seconds = 0.0
        self.started, self.waited_before = math.nan, 0.0
        self.has_begun = False
        self.best_rate: float | None = None  # samples per second of a card at its best

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clock: StepClock = trainer.profiler  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not math.isnan(self.started):
            return
        # the wait for data is part of the cost, but for the first one, in which the workers start
        now = time.perf_counter()
        self.started = self.clock.fetching_since if self.has_begun else now
        self.waited_before = self.clock.own_s[FETCH] - (self.clock.last_fetch_s if self.has_begun else 0.0)
        self.has_begun = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += len(batch) * trainer.world_size
        self.steps += ends_step(trainer, batch_idx)
        logs = is_due(trainer, batch_idx, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if logs or is_due(trainer, batch_idx, self.pause_every_n_steps):
            self.seconds += time.perf_counter() - self.started
            self.waited_s += self.clock.own_s[FETCH] - self.waited_before
            self.started = math.nan
        if logs:
            pl_module.log_dict(self.figures(trainer, pl_module, batch), rank_zero_only=True)
            self.total_samples += self.samples
            self.total_seconds += self.seconds
            self.samples, self.steps, self.seconds, self.waited_s = 0, 0, 0.0, 0.0

    def figures(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> dict[str, float]:
        rate = self.samples / self.seconds
        figures = {
            "train/samples_per_s": rate,
            "train/step_s": self.seconds / self.steps,
            "train/data_wait_s": self.waited_s / self.steps,
        }
        if trainer.strategy.root_device.type == "cuda" and trainer.is_global_zero:
            if self.best_rate is None:
                self.best_rate = best_rate(pl_module.model, batch, trainer)
            figures |= {"train/mfu": rate / trainer.world_size / self.best_rate} if self.best_rate else {}
        return figures

    @property
    def mean_samples_per_s(self) -> float:
        return self.total_samples / self.total_seconds if self.total_seconds else math.nan


def best_rate(model: Any, batch: Any, trainer: L.Trainer) -> float:
    """Samples per second at which this process's card would do its best; 0 where that is not known, which is told."""
    device = trainer.strategy.root_device
    try:
        with trainer.precision_plugin.forward_context():
            flops = count_flops(model, batch)
    except (
        RuntimeError,
        NotImplementedError,
    ) as error:  # an operation whose shapes cannot be followed ends no training
        log.warning("train/mfu is left out, since the FLOPs of a step could not be counted: %s", brief(error))
        return 0.0
    peak = peak_flops(device, str(trainer.precision))
    if flops is None or peak is None:
        log.info(
            "train/mfu is left out: %s", "weights are shared out" if flops is None else f"no peak known of {device}"
        )
        return 0.0
    return peak * len(batch) / flops


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
