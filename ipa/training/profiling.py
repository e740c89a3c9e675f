"""Where the time of a training step goes.

Lightning reports every action to its profiler. ``StepClock`` always runs, for `train/data_wait_s`. With
``profile=true``, ``StepProfile`` times some steps, with a synchronisation between the parts, then traces some more.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from torch.profiler import record_function

from ipa.files import write_atomically
from ipa.training.hooks import Order, TrainingCallback, ends_step

log = logging.getLogger(__name__)

FETCH = "[_TrainingEpochLoop].train_dataloader_next"
MODEL = "[Model]"  # prefix of the parts that ``IPAdapterModel.errors`` names
# part of a step → suffixes of its actions; the first match counts
PARTS = {
    "data wait": (".train_dataloader_next",),
    "transfer": ("batch_transfer", "batch_to_device"),
    "VAE": (f"{MODEL}VAE",),
    "image encoder": (f"{MODEL}image encoder",),
    "text encoder": (f"{MODEL}text encoder",),
    "image tokens": (f"{MODEL}image tokens",),
    "denoiser": (f"{MODEL}denoiser",),
    "loss": (".training_step",),
    "backward": (".backward", "_backward"),
    "optimizer": ("optimizer_step", "zero_grad", "configure_gradient_clipping"),
}
CALLBACKS, REST = "callbacks", "loop and loggers"
PLAN = {5: "timed", 25: "traced", 28: "end"}  # steps of this process → what begins after them


class StepClock(Profiler):
    """Own seconds of every action since the clock was made, without the actions inside it."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.device = device  # synchronised between actions, if it is CUDA
        self.own_s: defaultdict[str, float] = defaultdict(float)
        self.running: list[str] = []
        self.since = time.perf_counter()
        self.fetching_since = self.since  # when the wait for the newest batch began
        self.last_fetch_s = 0.0

    def start(self, action_name: str) -> None:
        self.account()
        self.running.append(action_name)
        if action_name == FETCH:
            self.fetching_since = self.since

    def stop(self, action_name: str) -> None:
        self.account()
        self.running.pop()
        if action_name == FETCH:
            self.last_fetch_s = self.since - self.fetching_since

    def account(self) -> None:
        """Add the time since the last call to the innermost action."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.own_s[self.running[-1] if self.running else ""] += now - self.since
        self.since = now

    def read(self) -> dict[str, float]:
        """Own seconds of every action up to now."""
        self.account()
        return dict(self.own_s)

    def since_reading(self, before: Mapping[str, float]) -> dict[str, float]:
        """Own seconds since an earlier reading; their sum is the time that passed."""
        return {name: seconds - before.get(name, 0.0) for name, seconds in self.read().items()}


class StepProfile(TrainingCallback):
    """Writes ``folder/table.md`` and ``folder/trace.json.gz`` of the first steps, on the first rank."""

    order = Order.LAST

    def __init__(self, folder: Path, clock: StepClock) -> None:
        self.folder, self.clock = folder, clock
        self.plan: dict[int, str] = {}  # step → what begins after it
        self.phase = ExitStack()  # what is measured now

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.plan = {trainer.global_step + after: phase for after, phase in PLAN.items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if ends_step(trainer, batch_idx) and (phase := self.plan.pop(trainer.global_step, None)):
            self.phase.close()
            if phase == "timed":
                self.phase.enter_context(self.timing(trainer, pl_module.model))
            elif phase == "traced":
                self.phase.enter_context(self.tracing())

    @contextmanager
    def timing(self, trainer: Any, model: Any) -> Iterator[None]:
        """Write a table of the steps inside, unless there is none."""
        model.part = lambda name: self.clock.profile(MODEL + name)
        self.clock.device = trainer.strategy.root_device
        first, before = trainer.global_step, self.clock.read()
        try:
            yield
        finally:
            seconds, steps = self.clock.since_reading(before), trainer.global_step - first
            self.clock.device, model.part = None, record_function
        if steps:
            title = f"Steps {first + 1} to {first + steps}, mean, synchronised between the parts"
            text = f"{title}:\n\n{table(by_part(seconds), steps)}\n"
            write_atomically(self.folder / "table.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
            log.info("\n%s", text)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        with torch.profiler.profile() as tracer:
            yield
        path = self.folder / "trace.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        tracer.export_chrome_trace(str(path))
        log.info("the trace is in %s: open it on ui.perfetto.dev or in chrome://tracing", path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A short run writes what it has."""
        self.phase.close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Drop the measurement of a step that failed, and leave nothing running."""
        self.plan.clear()
        self.phase.__exit__(type(exception), exception, exception.__traceback__)


def by_part(seconds: Mapping[str, float]) -> dict[str, float]:
    """Part of a step → seconds; the sum is that of ``seconds``."""
    parts = dict.fromkeys([*PARTS, CALLBACKS, REST], 0.0)
    for action, value in seconds.items():
        parts[part_of(action)] += value
    return {name: value for name, value in parts.items() if value}


def part_of(action: str) -> str:
    if action.startswith("[Callback]"):
        return CALLBACKS
    return next((part for part, ends in PARTS.items() if action.endswith(ends)), REST)


def table(parts: Mapping[str, float], steps: int) -> str:
    """Milliseconds per step and share of each part, in Markdown."""
    whole = sum(parts.values())
    rows = [f"| {name} | {1000 * value / steps:.2f} | {value / whole:.1%} |" for name, value in parts.items()]
    return "\n".join(
        ["| part | ms | share |", "|---|---|---|", *rows, f"| **step** | {1000 * whole / steps:.2f} | 100.0% |"]
    )
