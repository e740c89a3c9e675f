"""Callbacks that stand by in a real run: some stop it, others remember what went through it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode


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


class SignalAt(L.Callback):
    """Sends this process a signal once, at one of the moments that a training has, while the file ``flag`` is there."""

    def __init__(self, moment: str, step: int, number: int, flag: str) -> None:
        self.moment, self.step, self.number, self.flag = moment, step, number, Path(flag)

    def at(self, moment: str, step: int) -> None:
        if (moment, step) == (self.moment, self.step) and self.flag.exists():
            self.flag.unlink()
            os.kill(os.getpid(), self.number)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.at("setup", 0)
        pl_module.model.family.unet.register_forward_pre_hook(lambda *_: self.in_denoiser(trainer))
        source = trainer.datamodule.train_order.sources[0]
        read = source.read
        object.__setattr__(source, "read", lambda shard: self.slow(trainer, read(shard)))

    def in_denoiser(self, trainer: L.Trainer) -> None:
        kind = "step" if torch.is_grad_enabled() else "preview"
        self.at(kind, trainer.global_step + (kind == "step"))

    def slow(self, trainer: L.Trainer, records: Any) -> Any:
        """The records, which take long at that moment."""
        for record in records:
            if self.moment == "data" and trainer.global_step >= self.step:
                self.at("data", self.step)
                time.sleep(0.01)
            yield record

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.at("start", trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.at("end", trainer.global_step)


def signal_at(moment: str, step: int, number: int, flag: Path) -> list[str]:
    """The overrides for a run that gets a signal once, and the flag that they need."""
    flag.touch()
    values = {"_target_": f"{__name__}.SignalAt", "moment": moment, "step": step, "number": number, "flag": flag}
    return [f"+callbacks.signal.{name}={value}" for name, value in values.items()]


class CountsFetches(TorchDispatchMode):
    """Counts every value of a tensor that becomes a number of Python, for which a GPU is waited for."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class FetchesOfSteps(L.Callback):
    """Writes into ``file`` how many values were fetched in each step, waiting for its data included."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.mode: CountsFetches | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.end_step()
        self.mode = CountsFetches()
        self.mode.__enter__()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.end_step()

    def end_step(self) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            with self.file.open("a") as file:
                file.write(f"{self.mode.number}\n")
        self.mode = None


def fetches(file: Path) -> list[str]:
    return [f"+callbacks.fetches._target_={__name__}.FetchesOfSteps", f"+callbacks.fetches.file={file}"]


def train_of_ranks(rank: int, folders: list[Path], overrides: list[list[str]]) -> None:
    """Each rank with a folder and options of its own; how it ended is written beside its folder."""
    from conftest import run_training

    end: BaseException | None = None
    try:
        run_training(folders[rank], *overrides[rank])
    except (SystemExit, ValueError) as error:
        end = error
    folders[rank].with_name(f"end_{rank}").write_text(f"{type(end).__name__}: {end}")
