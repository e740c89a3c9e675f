"""The LightningModule: one loss, one optimizer over the trainable set, checkpoints that hold only that set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ipa.distributed import mean_over_ranks
from ipa.model import IPAdapterModel
from ipa.training.average import Average, WeightAverage
from ipa.training.hooks import ends_step
from ipa.training.optimizers import ScheduleFreeAverage, averages
from ipa.training.strategies import like, shard, whole
from ipa.types import Batch

TRAINABLE, AVERAGE = "trainable.", "average."


class AdapterTraining(L.LightningModule):
    """Trains ``model.trainable``.

    ``make_schedule`` takes ``optimizer=`` and returns a learning rate scheduler that counts steps. With ``ema_decay``,
    or a schedule-free optimizer, an average of the weights is kept. ``metadata`` goes into every checkpoint, so that it
    can be exported by itself.

    The state dict is the trainable set (`trainable.image_proj.…`, `trainable.ip_adapter.…`) and its average
    (`average.…`), never the frozen parts; loading one leaves those unchanged.
    """

    def __init__(
        self,
        model: IPAdapterModel,
        make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        make_schedule: Callable[..., Any] | None = None,
        ema_decay: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer, self.make_schedule = make_optimizer, make_schedule
        self.average: Average | None = None
        if ema_decay is not None:
            self.average = WeightAverage(model.trainable, ema_decay)
        self.metadata = metadata or {}
        self.strict_loading = False
        self.skip: Tensor | None = None  # 1 on the device where FiniteGuard skips the step
        model.adapter.install()

    def configure_model(self) -> None:
        """Shard the weights, if the strategy does; Lightning calls this first."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"], self.trainer.strategy.shards_base)  # type: ignore[attr-defined]
            if isinstance(self.average, WeightAverage):
                self.average = WeightAverage(self.model.trainable, self.average.decay)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        errors = self.model.errors(batch)
        loss = mean_over_ranks(errors.loss) if self.will_log(batch_idx) else errors.loss  # waits for the other ranks
        self.log("train/loss", loss, batch_size=len(batch))
        # loggers take this as the row's step: the number of steps done, as in file names; Lightning would copy a plain
        # number to the device and wait for it
        self.log("step", torch.tensor(self.global_step + 1.0), batch_size=len(batch))
        return {"loss": errors.loss, "errors": errors}

    def will_log(self, batch_idx: int) -> bool:
        """Whether the step that this batch ends is logged."""
        trainer: Any = self.trainer
        return ends_step(trainer, batch_idx) and (self.global_step + 1) % trainer.log_every_n_steps == 0

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.model.trained())
        if averages(optimizer):
            self.average = ScheduleFreeAverage(self.model.trainable, optimizer)
        if self.make_schedule is None:
            return optimizer
        schedule = {"scheduler": self.make_schedule(optimizer=optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step, then the average, before any callback runs."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update(self.skip)

    def product(self) -> AbstractContextManager[None]:
        """While inside, the model has the weights of the adapter file: the average, if there is one."""
        return nullcontext() if self.average is None else self.average.inside()

    def describe(self) -> dict[str, str]:
        """Metadata of an adapter file that is written now."""
        return {**self.model.describe(), **self.metadata, "step": str(self.global_step)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["adapter_metadata"] = self.describe()
        optimizer: Any = self.optimizers()
        checkpoint["optimizer"] = type(getattr(optimizer, "optimizer", optimizer)).__name__

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Whole plain tensors; all ranks call this."""
        state: dict[str, Any] = prefixed(self.model.trainable.state_dict(), TRAINABLE)
        return whole(state if self.average is None else state | prefixed(self.average.state_dict(), AVERAGE))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the trainable set, which must be complete; the frozen rest is never in a state dict."""
        if self.average is not None:
            self.average.load_state_dict(part(state_dict, AVERAGE))
        own = dict(self.model.trainable.named_parameters())
        saved = part(state_dict, TRAINABLE)
        weights = {name: like(value, own[name]) if name in own else value for name, value in saved.items()}
        return self.model.trainable.load_state_dict(weights, strict=True, assign=assign)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
