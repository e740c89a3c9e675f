"""Throughput, the position in the data, λ at the start, and the adapter file."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from ipa.errors import UserError, brief
from ipa.export.heads import name_of
from ipa.export.published import to_published, write_adapter
from ipa.model import IPAdapterModel
from ipa.training.checkpointing import check_finite
from ipa.training.flops import count_flops, peak_flops
from ipa.training.hooks import Order, TrainingCallback, ends_step, is_due, logs_now
from ipa.training.profiling import FETCH, StepClock
from ipa.training.strategies import whole
from ipa.weights import read_dtype

log = logging.getLogger(__name__)


class Throughput(TrainingCallback):
    """Logs samples per second over all processes, and the mean step time and data wait of this process.

    What other callbacks do every ``pause_every_n_steps``, previews and checkpoints, is left out. On CUDA it also logs
    the model-FLOP utilisation. Lightning's ``ThroughputMonitor`` synchronises the device in every step.
    """

    def __init__(self, pause_every_n_steps: int = 0) -> None:
        self.pause_every_n_steps = pause_every_n_steps
        self.samples, self.steps = 0, 0
        self.seconds, self.waited_s = 0.0, 0.0
        self.total_samples = 0
        self.total_seconds = 0.0
        self.started, self.waited_before = math.nan, 0.0
        self.has_begun = False
        self.peak_rate: float | None = None  # samples per second of a card at its peak

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clock: StepClock = trainer.profiler  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not math.isnan(self.started):
            return
        # the wait for data counts, except the first, in which the workers start
        now = time.perf_counter()
        self.started = self.clock.fetching_since if self.has_begun else now
        self.waited_before = self.clock.own_s[FETCH] - (self.clock.last_fetch_s if self.has_begun else 0.0)
        self.has_begun = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.samples += len(batch) * trainer.world_size
        self.steps += ends_step(trainer, batch_idx)
        logs = logs_now(trainer, batch_idx)
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
            if self.peak_rate is None:
                self.peak_rate = peak_rate(pl_module.model, batch, trainer)
            figures |= {"train/mfu": rate / trainer.world_size / self.peak_rate} if self.peak_rate else {}
        return figures

    @property
    def mean_samples_per_s(self) -> float:
        return self.total_samples / self.total_seconds if self.total_seconds else math.nan


def peak_rate(model: IPAdapterModel, batch: Any, trainer: L.Trainer) -> float:
    """Samples per second of this process's card at its peak; 0, with the reason in the log, where it is unknown."""
    device = trainer.strategy.root_device
    try:
        with trainer.precision_plugin.forward_context():
            flops = count_flops(model, batch)
    except (RuntimeError, NotImplementedError) as error:  # an operation without a shape function
        log.warning("train/mfu is left out: the FLOPs of a step could not be counted (%s)", brief(error))
        return 0.0
    peak = peak_flops(device, str(trainer.precision))
    if flops is None or peak is None:
        log.info("train/mfu is left out: %s", "weights are sharded" if flops is None else f"unknown peak of {device}")
        return 0.0
    return peak * len(batch) / flops


class DataPosition(TrainingCallback):
    """Records the position of each consumed batch. ``rejects``: what all ranks skipped up to the last log step."""

    order = Order.DATA

    def __init__(self) -> None:
        self.rejects: Counter[str] = Counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        datamodule.consumed(batch)
        if logs_now(trainer, batch_idx):
            self.rejects = datamodule.all_rejects()
            counts = {f"data/rejected/{reason}": float(n) for reason, n in self.rejects.items()}
            pl_module.log_dict(counts, rank_zero_only=True)


class SameParts(TrainingCallback):
    """Guards options that may change with what they lead to: in another place, a run finds the same data and weights.

    ``moved`` holds those of a resumed run: name → (saved, given). ``frozen`` are hashes of the frozen parts, set for a
    run that begins or has moved parts; others keep the checkpoint's.
    """

    def __init__(self, moved: Mapping[str, tuple[Any, Any]]) -> None:
        self.moved = moved
        self.frozen: dict[str, str] = {}

    def needs_hashes(self, resumes: bool) -> bool:
        return not resumes or any(not name.startswith("data.") for name in self.moved)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["frozen"] = self.frozen

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises UserError with the saved place if something else is in the given one."""
        if not self.frozen:
            self.frozen = checkpoint.get("frozen", {})
        if not (self.moved and trainer.is_global_zero):
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        known = {"data": checkpoint[type(datamodule).__qualname__]["order"], **checkpoint.get("frozen", {})}
        found = {"data": datamodule.fingerprint(), **self.frozen}
        for name, (saved, given) in self.moved.items():
            part = name.partition(".")[0]
            if known.get(part, found[part]) != found[part]:
                raise UserError(
                    f"{name}={given} has other {'shards' if part == 'data' else 'weights'} than {saved}, which the run "
                    f"was trained with. Give {name}={saved}, or where that was moved to; to train on with others: "
                    "name=… resume=CHECKPOINT"
                )


class ScaleWarmup(TrainingCallback):
    """λ = step / ``num_steps`` in training, then 1 (0: always 1); a fresh adapter would change some bases at once."""

    order = Order.DATA

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.model.train_scale = min(1.0, trainer.global_step / self.num_steps) if self.num_steps else 1.0


class ExportAdapter(TrainingCallback):
    """Writes the adapter file every ``every_n_steps`` and at the last step, in ``layout``.

    With an average it holds the averaged weights, and the raw ones are written next to it as ``*_raw``.
    """

    order = Order.EXPORT

    def __init__(self, path: str | Path, every_n_steps: int, layout: str = "diffusers", dtype: str = "float16") -> None:
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self.layout = layout
        self.dtype = read_dtype(dtype, "callbacks.export.dtype")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_due(trainer, batch_idx, self.every_n_steps):
            with pl_module.product():
                self.write(pl_module, self.path)
            if pl_module.average is not None:
                self.write(pl_module, self.path.with_stem(f"{self.path.stem}_raw"))

    def write(self, pl_module: Any, path: Path) -> None:
        """All ranks gather the weights; the first writes."""
        model = pl_module.model
        tensors = to_published(whole(model.trainable.state_dict()), self.dtype, model.family.branches)
        check_finite(tensors, pl_module.global_step)
        if pl_module.global_rank == 0:
            write_adapter(path, tensors, {"head": name_of(model.head), **pl_module.describe()})
