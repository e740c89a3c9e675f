"""Monitors: error by noise level, gradient norm, and whether the image prompt is used."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ipa.distributed import mean_over_ranks, sum_over_ranks
from ipa.errors import UserError
from ipa.model import Errors, IPAdapterModel
from ipa.training.hooks import TrainingCallback, is_due, logs_now
from ipa.training.loggers import log_now
from ipa.training.strategies import total_norm
from ipa.types import Batch

NUM_STANDARD_ERRORS = 2  # that the mean gap must be above zero

log = logging.getLogger(__name__)


class TimestepBuckets(TrainingCallback):
    """Mean squared error by noise level, unweighted: `train/error_t/0.0-0.2` is the cleanest of five buckets.

    Sums stay on the device and are read at log steps only. An empty bucket has no value.
    """

    def __init__(self, num_buckets: int = 5) -> None:
        self.num_buckets = num_buckets
        self.sums: Tensor | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.add(outputs["errors"])
        if logs_now(trainer, batch_idx):
            log_now(trainer, self.take())

    @torch.no_grad()
    def add(self, errors: Errors) -> None:
        if self.sums is None:
            self.sums = torch.zeros(2, self.num_buckets, device=errors.error_B.device)
        bucket_B = (errors.time_B * self.num_buckets).long().clamp(max=self.num_buckets - 1)
        error_B = errors.error_B.detach()
        self.sums.index_add_(1, bucket_B, torch.stack([error_B, torch.ones_like(error_B)]))

    def take(self) -> dict[str, float]:
        """Means over all ranks since the last call; all ranks call this."""
        assert self.sums is not None
        totals, counts = sum_over_ranks(self.sums).tolist()
        self.sums = None
        edges = [round(i / self.num_buckets, 3) for i in range(self.num_buckets + 1)]
        return {
            f"train/error_t/{edges[i]}-{edges[i + 1]}": total / count
            for i, (total, count) in enumerate(zip(totals, counts, strict=True))
            if count
        }


class StepSize(TrainingCallback):
    """Logs the learning rate, `train/lr`, times Prodigy's estimate, and the gradient norm before clipping."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            gradients = [p.grad for p in pl_module.model.trainable.parameters() if p.grad is not None]
            pl_module.log("train/grad_norm", total_norm(gradients))
            group = optimizer.param_groups[0]
            pl_module.log("train/lr", group["lr"] * group.get("d", 1.0))


class AttentionRatios:
    """‖λ · image attention‖ / ‖text attention‖ of every layer: which carry the image, and whether it drowns the text.

    In transformers, which have no attention to the text alone, the layer's own attention takes its place. Squares are
    summed on the device. Give ``add`` to `IPAdapterModel.watch` around some calls of the denoiser.
    """

    def __init__(self) -> None:
        self.squares: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, host: str, text: Tensor, image: Tensor) -> None:
        squares_2 = torch.stack([each.float().square().sum() for each in (image, text)])
        self.squares[host] = self.squares[host] + squares_2 if host in self.squares else squares_2

    def take(self, groups: Mapping[str, str]) -> tuple[dict[str, float], dict[str, float]]:
        """Ratios of the layers, and of the groups that ``groups`` puts them in, over all ranks; all ranks call this."""
        if not self.squares:
            return {}, {}
        sums = sum_over_ranks(torch.stack([*self.squares.values()])).tolist()
        layers = dict(zip(self.squares, sums, strict=True))
        blocks: dict[str, list[float]] = {}
        for name, squares in layers.items():
            blocks[groups[name]] = [a + b for a, b in zip(blocks.get(groups[name], [0, 0]), squares, strict=True)]
        return as_ratios(layers), as_ratios(blocks)


def as_ratios(squares: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Ratios of the norms, given the squares of image and text; 0 without any text attention."""
    return {name: math.sqrt(image / text) if text else 0.0 for name, (image, text) in squares.items()}


class ImagePromptGuard(TrainingCallback):
    """Warns early if the image prompt is ignored: compares the error with the right image and with another one.

    Every ``every_n_steps`` the samples of the step are predicted twice more without drops, with their own reference and
    with their neighbour's, at the same noise and times. `image_prompt/gap` is (other − own) / own. It warns once, if
    the mean of the last ``patience`` gaps is not two standard errors above zero.

    `image_attention/LAYER` is the layer's ratio with the samples' own references, see ``AttentionRatios``; the ratios
    of the blocks are recorded in the adapter file.
    """

    def __init__(self, every_n_steps: int, patience: int = 10) -> None:
        if patience < 2:
            raise UserError(f"image_prompt.patience={patience}: give at least 2, for a standard error")
        self.every_n_steps = every_n_steps
        self.gaps: deque[float] = deque(maxlen=patience)
        self.has_warned = False
        self.attention: dict[str, float] = {}  # of each block, when it was last measured

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.record(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not is_due(trainer, batch_idx, self.every_n_steps) or len(batch) < 2:
            return
        model, ratios = pl_module.model, AttentionRatios()
        with trainer.precision_plugin.forward_context(), model.eagerly():
            own, other = compare_images(model, batch, ratios)
        values = {"own": own, "other": other, "gap": (other - own) / own}
        layers, self.attention = ratios.take({host.name: host.block for host in model.family.hosts()})
        log_now(trainer, {f"image_prompt/{name}": value for name, value in values.items()})
        log_now(trainer, {f"image_attention/{name}": value for name, value in layers.items()})
        self.record(pl_module)
        self.judge(values["gap"], trainer.global_step)

    def record(self, pl_module: Any) -> None:
        if self.attention:
            written = {name: round(value, 4) for name, value in self.attention.items()}
            pl_module.metadata["image_attention"] = json.dumps(written)

    def judge(self, gap: float, step: int) -> None:
        self.gaps.append(gap)
        if self.has_warned or not self.has_patience_ended:
            return
        mean, error = self.mean_gap()
        if not mean > NUM_STANDARD_ERRORS * error:
            self.has_warned = True
            log.warning(
                "step %d: the image prompt seems to be ignored: another image's reference raises the loss by only "
                "%.2f %% (± %.2f). Check that references and targets match, try a higher optimizer.lr, and check that "
                "the encoder distinguishes your images.",
                *(step, 100 * mean, 100 * error),
            )

    @property
    def has_patience_ended(self) -> bool:
        return len(self.gaps) == self.gaps.maxlen

    def mean_gap(self) -> tuple[float, float]:
        """The mean of the last gaps, and its standard error."""
        gaps = torch.tensor(self.gaps, dtype=torch.float64)
        return float(gaps.mean()), float(gaps.std()) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"gaps": list(self.gaps), "told": self.has_warned, "attention": self.attention}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gaps.extend(state_dict["gaps"])
        self.has_warned = state_dict["told"]
        self.attention = dict(state_dict.get("attention", {}))


@torch.no_grad()
def compare_images(model: IPAdapterModel, batch: Batch, ratios: AttentionRatios | None = None) -> tuple[float, float]:
    """Mean error over all ranks with the samples' own references and with their neighbours', of whole images.

    Nothing is dropped, and a loss mask does not count. ``ratios`` are of the own ones.
    """
    own = replace(batch.keep_all(), loss_mask_B1HW=None)
    model.watch = None if ratios is None else ratios.add
    try:
        errors = [model.errors(own).error_B.mean()]
    finally:
        model.watch = None
    errors.append(model.errors(own.with_neighbours_image()).error_B.mean())
    return tuple(mean_over_ranks(torch.stack(errors)).tolist())
