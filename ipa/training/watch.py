"""What a dashboard shows of a training beside its loss: error over time, gradients, and whether the image is heeded."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from ipa.distributed import mean_over_ranks, sum_over_ranks
from ipa.errors import UserError
from ipa.model import Errors, IPAdapterModel
from ipa.training.checkpointing import is_due
from ipa.training.loggers import log_now
from ipa.training.strategies import total_norm
from ipa.types import Batch

log = logging.getLogger(__name__)


class TimestepBuckets(L.Callback):
    """Mean squared error by noise level, unweighted: `train/error_t/0.0-0.2` is the cleanest of five buckets.

    Sums stay on the device and are read at log steps only. A bucket that no sample fell into has no value.
    """

    def __init__(self, num_buckets: int = 5) -> None:
        self.num_buckets = num_buckets
        self.sums: Tensor | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.add(outputs["errors"])
        if is_due(trainer, batch_idx, trainer.log_every_n_steps):  # type: ignore[attr-defined]
            log_now(trainer, self.take())

    @torch.no_grad()
    def add(self, errors: Errors) -> None:
        if self.sums is None:
            self.sums = torch.zeros(2, self.num_buckets, device=errors.error_B.device)
        bucket_B = (errors.time_B * self.num_buckets).long().clamp(max=self.num_buckets - 1)
        error_B = errors.error_B.detach()
        self.sums.index_add_(1, bucket_B, torch.stack([error_B, torch.ones_like(error_B)]))

    def take(self) -> dict[str, float]:
        """The means over all ranks since the last call: to be called by all of them."""
        assert self.sums is not None
        totals, counts = sum_over_ranks(self.sums).tolist()
        self.sums = None
        borders = [round(i / self.num_buckets, 3) for i in range(self.num_buckets + 1)]
        return {
            f"train/error_t/{borders[i]}-{borders[i + 1]}": total / count
            for i, (total, count) in enumerate(zip(totals, counts, strict=True))
            if count
        }


class StepSize(L.Callback):
    """Logs what decides how far a step goes: `train/lr`, and `train/grad_norm`, the gradient's before clipping."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            gradients = [p.grad for p in pl_module.model.trainable.parameters() if p.grad is not None]
            pl_module.log("train/grad_norm", total_norm(gradients))
            pl_module.log("train/lr", optimizer.param_groups[0]["lr"])


class ImagePromptGuard(L.Callback):
    """Tells early whether the image prompt is heeded: the error with the right image against that with another one.

    At every ``every_n_steps`` the samples of the step are predicted twice more, without drops: with their own reference
    and with their neighbour's, noise and times the same. `image_prompt/gap` is (other − own) / own; while it stays near
    zero, the adapter ignores what it is shown, whatever the loss does. When the mean of the last ``patience``
    measurements is not two standard errors above zero, a warning says so, once.
    """

    def __init__(self, every_n_steps: int, patience: int = 10) -> None:
        if patience < 2:
            raise UserError(f"image_prompt.patience={patience}: at least 2, since one measurement has no scatter")
        self.every_n_steps = every_n_steps
        self.gaps: deque[float] = deque(maxlen=patience)
        self.told = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not is_due(trainer, batch_idx, self.every_n_steps) or len(batch) < 2:
            return
        with trainer.precision_plugin.forward_context(), pl_module.model.eagerly():
            own, other = compare_images(pl_module.model, batch)
        values = {"own": own, "other": other, "gap": (other - own) / own}
        log_now(trainer, {f"image_prompt/{name}": value for name, value in values.items()})
        self.judge(values["gap"], trainer.global_step)

    def judge(self, gap: float, step: int) -> None:
        self.gaps.append(gap)
        if self.told or len(self.gaps) < (self.gaps.maxlen or 0):
            return
        gaps = torch.tensor(self.gaps, dtype=torch.float64)
        error = float(gaps.std()) / math.sqrt(len(gaps))
        if not float(gaps.mean()) > 2 * error:
            self.told = True
            log.warning(
                "step %d: the image prompt seems to be ignored: with another picture's reference the loss is higher by "
                "%.2f %% only (± %.2f). Are references and targets the same pictures? Try a higher optimizer.lr, or "
                "look whether the encoder tells your pictures apart.",
                step,
                100 * float(gaps.mean()),
                100 * error,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"gaps": list(self.gaps), "told": self.told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gaps.extend(state_dict["gaps"])
        self.told = state_dict["told"]


@torch.no_grad()
def compare_images(model: IPAdapterModel, batch: Batch) -> tuple[float, float]:
    """Mean error of all ranks' samples with their own reference, and with their neighbour's; nothing dropped."""
    own = batch.keep_all()
    means = torch.stack([model.errors(each).error_B.mean() for each in (own, own.with_neighbours_image())])
    return tuple(mean_over_ranks(means).tolist())


class ParameterTable(L.Callback):
    """Shows the trainable parameters on the dashboard: name, shape, number; and the frozen parts' totals."""

    COLUMNS = ("part", "shape", "parameters", "trained")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        rows = parameter_rows(pl_module.model)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("parameters", columns=list(self.COLUMNS), data=rows)
            elif isinstance(logger, TensorBoardLogger):
                lines = [self.COLUMNS, ["---"] * len(self.COLUMNS), *rows]
                table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
                logger.experiment.add_text("parameters", table)


def parameter_rows(model: IPAdapterModel) -> list[list[Any]]:
    rows = [[name, " × ".join(map(str, p.shape)), p.numel(), "yes"] for name, p in model.trainable.named_parameters()]
    frozen = [*model.family.named_children(), ("image encoder", model.encoder)]
    rows += [[name, "", count, "no"] for name, part in frozen if (count := sum(p.numel() for p in part.parameters()))]
    return [*rows, ["all that is trained", "", model.count_trainable(), "yes"]]
