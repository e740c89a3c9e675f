"""The random generators of every rank, kept in checkpoints: for parts that draw by themselves, as dropout does."""

from __future__ import annotations

import random
from typing import Any, cast

import lightning as L
import numpy as np
import torch

from ipa.distributed import gather


class RandomState(L.Callback):
    """A training's own draws have addresses and need none of it. With another number of ranks it is left as seeded."""

    def __init__(self) -> None:
        self.saved: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": gather(collect())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict["ranks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Not earlier: the loaders draw from the same generators when they start their workers."""
        if len(self.saved) == trainer.world_size:
            restore(self.saved[trainer.global_rank])
        self.saved = []


def collect() -> dict[str, Any]:
    """As tensors and plain containers."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore(state: dict[str, Any]) -> None:
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
