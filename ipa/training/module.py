"""The LightningModule: one loss, one optimizer over the trainable set, checkpoints that hold nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer

from ipa.model import IPAdapterModel
from ipa.types import Batch

TRAINABLE = "trainable."


class AdapterTraining(L.LightningModule):
    """Trains ``model.trainable``; ``make_optimizer`` takes its parameters and returns the optimizer.

    The state dict is the trainable set alone (`trainable.image_proj.…`, `trainable.ip_adapter.…`): the frozen parts are
    never in a checkpoint, and loading one leaves them as they are.
    """

    def __init__(self, model: IPAdapterModel, make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer = make_optimizer
        self.strict_loading = False
        model.adapter.install()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.model.losses(batch).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        # loggers take this for the row's step: the number of steps done, as files and checkpoints count them
        self.log("step", float(self.global_step + 1), batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.model.trainable.parameters())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {f"{TRAINABLE}{name}": value for name, value in self.model.trainable.state_dict().items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the trainable set, which must be there whole; ``strict`` is about the frozen rest, which never is."""
        own = {name.removeprefix(TRAINABLE): value for name, value in state_dict.items()}
        return self.model.trainable.load_state_dict(own, strict=True, assign=assign)
