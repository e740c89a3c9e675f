"""Optimizers beside AdamW: its 8-bit and schedule-free variants and Prodigy, whose packages are optional, and Muon.

    python train.py optimizer=schedule_free schedule=constant ema.decay=null optimizer.lr=3e-3

Each takes the trained parameters. docs/training.md says which is for what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from ipa.errors import MissingWeights, UserError
from ipa.training.average import COUNT
from ipa.training.checkpointing import load

PACKAGES = {"adamw_8bit": "bitsandbytes", "schedule_free": "schedulefree", "prodigy": "prodigyopt"}
CLASSES = {"adamw_8bit": "AdamW8bit", "schedule_free": "AdamWScheduleFree", "prodigy": "Prodigy"}
STATE_BYTES = {"adamw_8bit": 2, "prodigy": 16}  # of a parameter; Prodigy keeps two sums besides the moments
OWN = f"{__name__}."
LEAST_PRODIGY_LR = 0.01
CONSTANT = ("constant", "constant_with_warmup")
SHARDING = ("fsdp", "zero2")


def adamw_8bit(params: Iterable[nn.Parameter], **options: Any) -> Optimizer:
    """AdamW whose moments take a byte each (Dettmers et al. 2022)."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, **options)


def schedule_free(params: Iterable[nn.Parameter], **options: Any) -> Optimizer:
    """AdamW that averages its weights in place of lowering the learning rate (Defazio et al. 2024), ready to train."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(params, **options)
    optimizer.train()
    return optimizer


def prodigy(params: Iterable[nn.Parameter], **options: Any) -> Optimizer:
    """Adam that estimates its step size (Mishchenko & Defazio 2024); ``lr`` multiplies the estimate."""
    from prodigyopt import Prodigy

    return Prodigy(params, **options)


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for matrices and AdamW for all other parameters, as one optimizer.

    Muon's updates are scaled to AdamW's usual size (Liu et al. 2025), so that both take the same ``lr``.
    """

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


class SizedState(Optimizer):
    """An optimizer with as many bytes of state for each parameter as another, which does not run on fake tensors."""

    def __init__(self, params: Iterable[nn.Parameter], state_bytes: int) -> None:
        super().__init__(params, {})
        self.state_bytes = state_bytes

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for parameter in (each for group in self.param_groups for each in group["params"]):
            if parameter not in self.state:
                size = parameter.numel() * self.state_bytes
                self.state[parameter] = torch.empty(size, dtype=torch.uint8, device=parameter.device)


def optimizer_for_estimate(cfg: DictConfig) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """The configured optimizer, or one of its size, for an estimate of memory."""
    if state_bytes := STATE_BYTES.get(name_of(cfg.optimizer)):
        return partial(SizedState, state_bytes=state_bytes)
    made: Callable[[Iterable[nn.Parameter]], Optimizer] = instantiate(cfg.optimizer)
    return made


def name_of(optimizer: DictConfig) -> str:
    return str(optimizer._target_).removeprefix(OWN)


class ScheduleFreeAverage:
    """The average x that a schedule-free optimizer trains, in the place of a `WeightAverage` of ``module``.

    The module has y = (1 − β₁) z + β₁ x in training; ``inside``, where files, previews and scores are made, it has x.
    """

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters, self.optimizer = list(module.parameters()), optimizer

    def update(self, skip: Tensor | None = None) -> None:
        """The optimizer's step has done it."""

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While inside, the module has the averaged weights; afterwards it has its own again, to the bit."""
        current = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()
            with torch.no_grad():
                for parameter, value in zip(self.parameters, current, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the module's names, for readers of the checkpoint, and the number of steps."""
        with self.inside():
            averaged = {name: each.detach().clone() for name, each in zip(self.names, self.parameters, strict=True)}
        return averaged | {COUNT: torch.tensor(self.optimizer.param_groups[0]["k"])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The average follows from the weights and the optimizer's state."""


def averages(optimizer: Any) -> bool:
    """Whether it is schedule-free."""
    return callable(getattr(optimizer, "eval", None))


def check_same_optimizer(cfg: DictConfig, checkpoint: Path) -> None:
    """Raise UserError if another run's checkpoint has the state of another optimizer than the configured one."""
    name = name_of(cfg.optimizer)
    asked = CLASSES.get(name, name.rpartition(".")[2])
    if (saved := load(checkpoint, mmap=True).get("optimizer", asked)) != asked:
        raise UserError(
            f"resume={checkpoint}: it was trained with {saved}, not {asked}. Give its optimizer=, or "
            f"adapter.init_from={checkpoint} to take only the weights"
        )


def check_optimizer(cfg: DictConfig) -> None:
    """Raise UserError for a missing package, and for options that do not go together."""
    name = name_of(cfg.optimizer)
    package = PACKAGES.get(name)
    if package and find_spec(package) is None:
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
    if (name in PACKAGES or name == MuonWithAdamW.__name__) and kind in SHARDING:
        raise UserError(
            f"trainer.strategy.kind={kind} shards the weights, which this optimizer does not know: give "
            "optimizer=adamw, or trainer=ddp"
        )
