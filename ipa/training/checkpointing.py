"""Checkpoints that survive a kill at any moment: written beside, forced to disk, renamed; read without pickled code."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from ipa.checkpoint import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files with an atomic write; raises OSError when the disk is full, the old file stays."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        content = io.BytesIO()  # torch's own file writer ends the process when it cannot write
        torch.save(checkpoint, content)
        write_atomically(Path(path), lambda beside: beside.write_bytes(content.getbuffer()))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)


class Checkpoints(Checkpoint):
    """``last.ckpt`` at every ``every_n_steps`` and at the end; the best by ``monitor`` beside it (`step_000300.ckpt`).

    Without a score at that step, for want of a judge or of held-out pictures, there is only the last one. The best is
    written before the last, which names it, and the outdone one goes after both, so that a kill leaves no gap.
    """

    def __init__(self, folder: str | Path, every_n_steps: int, monitor: str, mode: str = "max") -> None:
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.sign = {"max": 1, "min": -1}[mode]
        self.best: dict[str, Any] = {"name": "", "score": None}

    @property
    def best_path(self) -> Path | None:
        return self.folder / self.best["name"] if self.best["name"] else None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_due(trainer, batch_idx, self.every_n_steps):
            check_finite(pl_module.model.trainable.state_dict(), trainer.global_step)
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        score = trainer.strategy.broadcast(trainer.callback_metrics.pop(self.monitor, None))
        outdone = None
        if score is not None and self.is_better(float(score)):
            outdone = self.best_path
            self.best = {"name": f"step_{trainer.global_step:06d}.ckpt", "score": float(score)}
            trainer.save_checkpoint(self.folder / self.best["name"])
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if outdone is not None and outdone != self.best_path:
            trainer.strategy.remove_checkpoint(outdone)

    def is_better(self, score: float) -> bool:
        return self.best["score"] is None or self.sign * score > self.sign * self.best["score"]

    def state_dict(self) -> dict[str, Any]:
        return self.best

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = dict(state_dict)


def is_due(trainer: L.Trainer, batch_idx: int, every_n_steps: int) -> bool:
    """Whether what is done at every so many steps, and at the last, is due after this batch; 0 means at the last."""
    step = trainer.global_step
    if (batch_idx + 1) % trainer.accumulate_grad_batches:
        return False  # the step is still that of an earlier batch
    return step == trainer.max_steps or (every_n_steps > 0 and step % every_n_steps == 0)


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise ValueError rather than let weights be saved that nobody can use."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"after step {step} {len(broken)} of the {len(tensors)} trained weights are not finite or too large for "
            f"their file ({broken[0]} …), so they are not saved. "
            "Try a smaller optimizer.lr or trainer.gradient_clip_val=1."
        )
