"""Explanations of a failed fit: out of memory, a missing compiler, an error in a data worker."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from ipa.errors import UserError
from ipa.training.strategies import AdapterFSDP

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"  # a plain RuntimeError
KILLED = "is killed by signal: Killed"
LOST_PIPE = (EOFError, ConnectionError)  # a batch that was on its way
LOST_WORKER = ("is killed by signal: Bus error", "exited unexpectedly")  # also workers.die
GIB = 1 << 30
MAX_ALLOCATOR_LENGTH = 300


def explain_fit_failure(error: BaseException, cfg: DictConfig, trainer: L.Trainer, datamodule: Any) -> None:
    """Raise UserError from ``error`` if the user can fix it; return otherwise."""
    if isinstance(error, UserError):
        explain_worker(error)
    else:
        explain_compiler(error)
        explain_memory(error, cfg, trainer, datamodule)


def explain_worker(error: UserError) -> None:
    """Raise a data worker's error with its own message: torch makes the worker's traceback a part of it."""
    kind, text = type(error), str(error)
    if text.startswith(f"Caught {kind.__name__} in DataLoader worker process"):
        *_, message = re.split(rf"^[\w.]*{kind.__name__}: ", text, flags=re.MULTILINE)
        raise kind(message.strip()) from error


def explain_compiler(error: BaseException) -> None:
    """Raise UserError if torch found no compiler for ``compile=true``."""
    kinds = {type(cause).__name__ for cause in causes(error)}
    if kinds & {"InvalidCxxCompiler", "TritonMissing"}:
        raise UserError(
            "compile=true needs a compiler: g++ for the CPU (or name one with CXX=…), Triton for a GPU, which comes "
            "with torch on Linux. Install it, or give compile=false"
        ) from error


def explain_memory(error: BaseException, cfg: DictConfig, trainer: L.Trainer, datamodule: Any) -> None:
    """Raise UserError with the options that decide how much memory is needed, if there was not enough."""
    explain_lost_worker(error, cfg)
    for cause in causes(error):
        if isinstance(cause, torch.OutOfMemoryError | MemoryError) or CPU_ALLOCATOR in str(cause):
            raise UserError(describe_memory(cause, cfg, trainer, datamodule)) from error


def explain_lost_worker(error: BaseException, cfg: DictConfig) -> None:
    """The kernel's reason is in a cause; torch's "exited unexpectedly" comes with it, or alone; or a pipe ends."""
    messages = [str(cause).strip() for cause in causes(error)]
    if isinstance(error, LOST_PIPE):
        messages.append(LOST_WORKER[-1])
    for words in messages:
        if KILLED in words:
            raise UserError(describe_killed_worker(words, cfg)) from error
    for words in messages:
        if any(each in words for each in LOST_WORKER):
            raise UserError(f"a data worker is gone, probably short of shared memory: {words}. {MORE_SHM}") from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def describe_memory(error: BaseException, cfg: DictConfig, trainer: L.Trainer, datamodule: Any) -> str:
    on_host = trainer.strategy.root_device.type != "cuda" or not isinstance(error, torch.OutOfMemoryError)
    device = f"the CPU, {total_memory_gib():.1f} GiB" if on_host else describe_card(trainer.strategy.root_device)
    listed = "".join(f"\n  {number}. {each}" for number, each in enumerate(advice(cfg, trainer, datamodule), 1))
    recomputes = "on" if cfg.gradient_checkpointing else "off"
    return (
        f"out of memory in step {trainer.global_step + 1} or its preview, on {device}. Each of {trainer.world_size} "
        f"processes takes {datamodule.batch_size} samples at a time (data.batch_size), "
        f"{trainer.accumulate_grad_batches} times a step, at {datamodule.images.image_size_px} px, with precision "
        f"{trainer.precision} and gradient checkpointing {recomputes}.\nTry, in this order:{listed}\nOptions that "
        "change the arithmetic need a new run: name=… resume=CHECKPOINT starts it from the last checkpoint.\n"
        f"Allocator: {allocator_message(error)}"
    )


def advice(cfg: DictConfig, trainer: L.Trainer, datamodule: Any) -> list[str]:
    tries = []
    if fewer := smaller_share(datamodule.batch_size):
        times = trainer.accumulate_grad_batches * datamodule.batch_size // fewer
        size = f"data.batch_size={fewer} " if cfg.data.batch_size is not None else ""
        tries.append(f"{size}trainer.accumulate_grad_batches={times}: {fewer} samples at a time, as many per step")
    if not cfg.gradient_checkpointing:
        tries.append("gradient_checkpointing=true: much less memory, about a third slower")
    tries.append(f"image_size_px: less than {datamodule.images.image_size_px}")
    if not isinstance(trainer.strategy, AdapterFSDP):
        tries.append("trainer=fsdp on several GPUs: each keeps only a part of the frozen base")
    if trainer.precision == "32-true":
        tries.append("trainer.precision=bf16-mixed base.dtype=bfloat16 encoder.dtype=bfloat16: half for frozen parts")
    tries.append(f"in previews: sampling.batch_size, or preview.num_scored={cfg.preview.num_scored}: less")
    return tries


def smaller_share(batch_size: int) -> int | None:
    """The largest smaller batch that divides it, so that a step keeps its samples."""
    return next((batch_size // part for part in range(2, batch_size + 1) if batch_size % part == 0), None)


def describe_card(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"


def total_memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def allocator_message(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    start = max(words.find(CPU_ALLOCATOR), 0)  # skips the C++ check
    return words[start : start + MAX_ALLOCATOR_LENGTH]


MORE_SHM = "Make /dev/shm larger (docker run --shm-size=8g), or try data.num_workers=0 or a smaller data.batch_size"


def describe_killed_worker(words: str, cfg: DictConfig) -> str:
    return (
        f"a data worker was killed: {words} The kernel does so when the memory of the machine "
        f"({total_memory_gib():.1f} GiB) is full; see `dmesg`. Each of data.num_workers={cfg.data.num_workers} holds "
        f"the encoded samples of its open windows (data.window={cfg.data.get('window')}): try less of either, or a job "
        "with more memory. The same command resumes from the last checkpoint"
    )
