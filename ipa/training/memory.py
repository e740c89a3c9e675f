"""Out of memory, told with the options that decide how much is needed, in the order in which to try them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from ipa.errors import UserError

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"  # a RuntimeError, and no class of its own
KILLED = "is killed by signal: Killed"
SHARED_MEMORY = "is killed by signal: Bus error"
PREVIEWS = "ipa.training.previews"
GIB = 1 << 30


class OutOfMemory(UserError):
    """There was not enough memory for what was asked."""


def explain_memory(error: BaseException, cfg: DictConfig, trainer: L.Trainer, datamodule: Any) -> None:
    """Raise OutOfMemory from ``error`` if that is what it means; return otherwise."""
    for cause in causes(error):
        words = str(cause)
        if KILLED in words or SHARED_MEMORY in words:
            raise OutOfMemory(tell_worker(words, cfg)) from error
        if isinstance(cause, torch.OutOfMemoryError | MemoryError) or CPU_ALLOCATOR in words:
            raise OutOfMemory(tell(cause, cfg, trainer, datamodule)) from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def tell(error: BaseException, cfg: DictConfig, trainer: L.Trainer, datamodule: Any) -> str:
    in_host = trainer.strategy.root_device.type != "cuda" or not isinstance(error, torch.OutOfMemoryError)
    device = f"the CPU, {total_memory_gib():.1f} GiB" if in_host else card(trainer.strategy.root_device)
    if is_in_previews(error):
        what, tries = "the previews", try_for_previews(cfg)
    else:
        what = f"step {trainer.global_step + 1}"
        tries = try_for_steps(cfg, trainer, datamodule)
    listed = "".join(f"\n  {number}. {each}" for number, each in enumerate(tries, 1))
    return (
        f"out of memory in {what}, on {device}. {setting(cfg, trainer, datamodule)}\nTry, in this order:{listed}\n"
        "A run that has checkpoints keeps its options: give another name= as well, and resume=FILE to start from its "
        f"last checkpoint.\nThe allocator says: {first_sentence(error)}"
    )


def setting(cfg: DictConfig, trainer: L.Trainer, datamodule: Any) -> str:
    recomputes = "on" if cfg.gradient_checkpointing else "off"
    return (
        f"Each of {trainer.world_size} processes takes {datamodule.batch_size} samples at a time (data.batch_size), "
        f"{trainer.accumulate_grad_batches} times a step, at {datamodule.image_size_px} px, with precision "
        f"{trainer.precision} and gradient checkpointing {recomputes}."
    )


def try_for_steps(cfg: DictConfig, trainer: L.Trainer, datamodule: Any) -> list[str]:
    tries = []
    if fewer := smaller_share(datamodule.batch_size):
        times = trainer.accumulate_grad_batches * datamodule.batch_size // fewer
        size = f"data.batch_size={fewer} " if cfg.data.batch_size is not None else ""
        tries.append(f"{size}trainer.accumulate_grad_batches={times}: {fewer} at a time, as many in a step as now")
    if not cfg.gradient_checkpointing:
        tries.append("gradient_checkpointing=true: much less memory, about a third slower")
    tries.append(f"image_size_px: less than {datamodule.image_size_px}")
    if not is_sharded(trainer):
        tries.append("trainer=fsdp on several GPUs: each keeps a part of the frozen base only")
    if trainer.precision == "32-true":
        tries.append("trainer.precision=bf16-mixed base.dtype=bfloat16 encoder.dtype=bfloat16: half for what is frozen")
    return tries


def try_for_previews(cfg: DictConfig) -> list[str]:
    return [
        "sampling.batch_size: fewer pictures at a time",
        f"preview.num_prompts={cfg.preview.num_prompts} and preview.num_scored={cfg.preview.num_scored}: fewer",
    ]


def smaller_share(batch_size: int) -> int | None:
    """Half, or the next part that divides it: the samples of a step stay the same."""
    return next((batch_size // part for part in range(2, batch_size + 1) if batch_size % part == 0), None)


def is_sharded(trainer: Any) -> bool:
    return "FSDP" in type(trainer.strategy).__name__


def card(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"


def total_memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def is_in_previews(error: BaseException) -> bool:
    return any(frame.f_globals.get("__name__") == PREVIEWS for frame, _ in traceback.walk_tb(error.__traceback__))


def first_sentence(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    start = max(words.find(CPU_ALLOCATOR), 0)  # what the C++ check says before it is of no use
    return words[start : start + 300]


def tell_worker(words: str, cfg: DictConfig) -> str:
    if SHARED_MEMORY in words:
        return (
            f"a data worker ended, for want of shared memory (/dev/shm): {words.strip()}. Make it larger (docker run "
            "--shm-size=8g, or --ipc=host), or try data.num_workers=0, or a smaller data.batch_size"
        )
    return (
        f"a data worker was killed from outside: {words.strip()} The kernel does so when the machine's memory "
        f"({total_memory_gib():.1f} GiB) is full; `dmesg` knows. Each of data.num_workers={cfg.data.num_workers} holds "
        f"the encoded samples of its open windows (data.window={cfg.data.get('window')}): try less of either, or a job "
        "with more memory. The same command goes on from the last checkpoint."
    )
