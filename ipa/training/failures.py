"""Explanations of a failed fit: out of memory, a missing compiler, an error in a data worker."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from ipa.errors import UserError, causes

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"  # a plain RuntimeError
KILLED = "is killed by signal: Killed"
LOST_PIPE = (EOFError, ConnectionError)  # a batch that was on its way
LOST_WORKER = ("is killed by signal: Bus error", "exited unexpectedly")  # also workers.die
MORE_SHM = "Make /dev/shm larger (docker run --shm-size=8g), or try data.num_workers=0 or a smaller data.batch_size"
GIB = 1 << 30
MAX_ALLOCATOR_LENGTH = 300


def explain_fit_failure(error: BaseException, cfg: DictConfig, trainer: L.Trainer, datamodule: Any) -> None:
    """Raise UserError from ``error`` if the user can fix it; return otherwise."""
    if isinstance(error, UserError):
        explain_worker(error)
        return
    chain = list(causes(error))
    explain_missing_compiler(error, chain)
    explain_lost_worker(error, chain, cfg)
    for cause in chain:
        if isinstance(cause, torch.OutOfMemoryError | MemoryError) or CPU_ALLOCATOR in str(cause):
            raise UserError(describe_memory(cause, cfg, trainer, datamodule)) from error


def explain_worker(error: UserError) -> None:
    """Raise a data worker's error with its own message: torch makes the worker's traceback a part of it."""
    kind, text = type(error), str(error)
    if text.startswith(f"Caught {kind.__name__} in DataLoader worker process"):
        *_, message = re.split(rf"^[\w.]*{kind.__name__}: ", text, flags=re.MULTILINE)
        raise kind(message.strip()) from error


def explain_missing_compiler(error: BaseException, chain: Sequence[BaseException]) -> None:
    if {type(cause).__name__ for cause in chain} & {"InvalidCxxCompiler", "TritonMissing"}:
        raise UserError(
            "compile=true needs a compiler: g++ for the CPU (or name one with CXX=…), Triton for a GPU, which comes "
            "with torch on Linux. Install it, or give compile=false"
        ) from error


def explain_lost_worker(error: BaseException, chain: Sequence[BaseException], cfg: DictConfig) -> None:
    """The kernel's reason is in a cause; torch's "exited unexpectedly" comes with it, or alone; or a pipe ends."""
    messages = [str(cause).strip() for cause in chain] + [LOST_WORKER[-1]] * isinstance(error, LOST_PIPE)
    for words in messages:
        if KILLED in words:
            raise UserError(
                f"a data worker was killed: {words} The kernel does so when the memory of the machine "
                f"({total_memory_gib():.1f} GiB) is full; see `dmesg`. Each of data.num_workers={cfg.data.num_workers} "
                f"holds the encoded samples of its open windows (data.window={cfg.data.get('window')}): try less of "
                "either, or a job with more memory. The same command resumes from the last checkpoint"
            ) from error
    for words in messages:
        if any(each in words for each in LOST_WORKER):
            raise UserError(f"a data worker is gone, probably short of shared memory: {words}. {MORE_SHM}") from error


def describe_memory(error: BaseException, cfg: DictConfig, trainer: L.Trainer, datamodule: Any) -> str:
    device = trainer.strategy.root_device
    on_host = device.type != "cuda" or not isinstance(error, torch.OutOfMemoryError)
    recomputes = "on" if cfg.gradient_checkpointing else "off"
    words = " ".join(str(error).split()) or type(error).__name__
    allocator = words[max(words.find(CPU_ALLOCATOR), 0) :][:MAX_ALLOCATOR_LENGTH]  # skips the C++ check
    return (
        f"out of memory in step {trainer.global_step + 1} or its preview, on "
        f"{f'the CPU, {total_memory_gib():.1f} GiB' if on_host else describe_card(device)}. Each of "
        f"{trainer.world_size} processes takes {datamodule.batch_size} samples at a time (data.batch_size), "
        f"{trainer.accumulate_grad_batches} times a step, at {datamodule.images.image_size_px} px, with precision "
        f"{trainer.precision} and gradient checkpointing {recomputes}.\nTry, in this order: a smaller data.batch_size "
        "with more trainer.accumulate_grad_batches; gradient_checkpointing=true; a smaller image_size_px; trainer=fsdp "
        "on several GPUs; trainer.precision=bf16-mixed base.dtype=bfloat16 encoder.dtype=bfloat16; in previews a "
        "smaller sampling.batch_size or preview.num_scored. Options that change the arithmetic need a new run: name=… "
        f"resume=CHECKPOINT starts it from the last checkpoint.\nAllocator: {allocator}"
    )


def describe_card(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"


def total_memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
