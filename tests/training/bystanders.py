"""Callbacks that stand by in a real run: one that stops it, and one that remembers what went through it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import lightning as L


class StopBefore(L.Callback):
    """Fails once before the batch that follows so many steps: while the file ``flag`` is there, which goes then."""

    def __init__(self, steps: int, flag: str) -> None:
        self.steps, self.flag = steps, Path(flag)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps and self.flag.exists():
            self.flag.unlink()
            raise RuntimeError("stopped on purpose")


def stopping(steps: int, flag: Path) -> list[str]:
    """The overrides for a run that is to stop once after so many steps, and the flag that they need."""
    flag.touch()
    return [
        f"+callbacks.stop._target_={__name__}.StopBefore",
        f"+callbacks.stop.steps={steps}",
        f"+callbacks.stop.flag={flag}",
    ]


class Witness(L.Callback):
    """Remembers of the last run in this process its trainer, its module, and the keys of the batches of every step."""

    trainer: ClassVar[L.Trainer]
    module: ClassVar[Any]
    keys: ClassVar[dict[int, list[list[str]]]]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        Witness.trainer, Witness.module, Witness.keys = trainer, pl_module, {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        Witness.keys.setdefault(trainer.global_step + 1, []).append(list(batch.keys))


WITNESS = f"+callbacks.witness._target_={__name__}.Witness"


class Ledger(L.Callback):
    """Writes of every batch its step, its keys and its loss into ``file``, a line each, at once."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        line = {"step": trainer.global_step, "keys": batch.keys, "loss": outputs["loss"].item().hex()}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
