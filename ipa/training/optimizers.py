"""Optimizers other than AdamW: its 8-bit and schedule-free variants and Prodigy (optional packages), and Muon.

    python train.py optimizer=schedule_free schedule=constant ema.decay=null optimizer.lr=3e-3

Each takes the trained parameters. docs/training.md says which is for what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from ipa.errors import MissingWeights, UserError
from ipa.training.average import COUNT, Average
from ipa.training.checkpointing import load

# optional packages and their classes: Dettmers et al. 2022; Defazio et al. 2024; Mishchenko & Defazio 2024
EXTRA = {
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"),  # a byte for each moment
    "schedule_free": ("schedulefree", "AdamWScheduleFree"),  # averages weights in place of a schedule
    "prodigy": ("prodigyopt", "Prodigy"),  # estimates its step size, which ``lr`` multiplies
}
STATE_BYTES = {"adamw_8bit": 2, "prodigy": 16, "MuonWithAdamW": 4}  # Prodigy keeps two sums besides the moments
OWN = f"{__name__}."
LEAST_PRODIGY_LR = 0.01
CONSTANT = ("constant", "constant_with_warmup")
SHARDING = ("fsdp", "zero2")


def make_extra(name: str, params: Iterable[nn.Parameter], **options: Any) -> Optimizer:
    """An optimizer of ``EXTRA``, ready to train."""
    package, kind = EXTRA[name]
    optimizer = getattr(import_module(package), kind)(params, **options)
    if averages(optimizer):
        optimizer.train()
    return optimizer


adamw_8bit, schedule_free, prodigy = (partial(make_extra, name) for name in EXTRA)


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for matrices, scaled to AdamW's updates (Liu et al. 2025), and AdamW for all others."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        known = list(params)
        matrices = [each for each in known if each.ndim == 2]
        others = [each for each in known if each.ndim != 2]
        self.parts: list[Optimizer] = []
        if matrices:
            own: dict[str, Any] = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay, **own))
        if others:
            self.parts.append(AdamW(others, lr=lr, weight_decay=weight_decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.share()

    def share(self) -> None:
        """Let the parts see this optimizer's groups and state."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def state_bytes(optimizer: DictConfig) -> int:
    """What it keeps of each parameter: two moments in fp32, unless it is in ``STATE_BYTES``."""
    return STATE_BYTES.get(name_of(optimizer), 8)


def name_of(optimizer: DictConfig) -> str:
    return str(optimizer._target_).removeprefix(OWN)


class ScheduleFreeAverage(Average):
    """The average x that a schedule-free optimizer trains; in training the module has y = (1 − β₁) z + β₁ x."""

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        super().__init__(module)
        self.optimizer = optimizer

    def show(self) -> None:
        self.optimizer.eval()

    def hide(self) -> None:
        self.optimizer.train()

    def state_dict(self) -> dict[str, Tensor]:
        """For readers of the checkpoint: the average follows from the weights and the optimizer's state."""
        with self.inside():
            averaged = {name: each.detach().clone() for name, each in zip(self.names, self.parameters, strict=True)}
        return averaged | {COUNT: torch.tensor(self.optimizer.param_groups[0]["k"])}


def averages(optimizer: Any) -> bool:
    """Whether it is schedule-free."""
    return callable(getattr(optimizer, "eval", None))


def check_same_optimizer(cfg: DictConfig, checkpoint: Path) -> None:
    """Raise UserError if another run's checkpoint has the state of another optimizer than the configured one."""
    name = name_of(cfg.optimizer)
    _, asked = EXTRA.get(name, ("", name.rpartition(".")[2]))
    if (saved := load(checkpoint, mmap=True).get("optimizer", asked)) != asked:
        raise UserError(
            f"resume={checkpoint}: it was trained with {saved}, not {asked}. Give its optimizer=, or "
            f"adapter.init_from={checkpoint} to take only the weights"
        )


def check_optimizer(cfg: DictConfig) -> None:
    """Raise UserError for a missing package, and for options that do not go together."""
    name = name_of(cfg.optimizer)
    package = EXTRA[name][0].partition(".")[0] if name in EXTRA else "torch"
    if find_spec(package) is None:
        raise MissingWeights(f"this optimizer needs the package {package}: pip install {package}")
    if name == "prodigy" and cfg.optimizer.lr < LEAST_PRODIGY_LR:
        raise UserError(
            f"optimizer.lr={cfg.optimizer.lr:g}: Prodigy finds the step size itself, and lr multiplies it: give "
            "optimizer.lr=1"
        )
    schedule = cfg.schedule.get("name")
    if name == "schedule_free" and (cfg.ema.decay is not None or schedule not in CONSTANT):
        raise UserError(
            f"ema.decay={cfg.ema.decay}, schedule.name={schedule}: a schedule-free optimizer averages the weights "
            "itself and needs a constant learning rate: give ema.decay=null schedule=constant"
        )
    kind = OmegaConf.select(cfg, "trainer.strategy.kind")
    if (name in EXTRA or name == MuonWithAdamW.__name__) and kind in SHARDING:
        raise UserError(
            f"trainer.strategy.kind={kind} shards the weights, which this optimizer does not know: give "
            "optimizer=adamw, or trainer=ddp"
        )
