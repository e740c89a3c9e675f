"""`python train.py`: build the parts from the configuration, fit, and say what came out.

A run lives in one folder: ``config.yaml`` (resolved), ``log.csv``, ``previews/``, ``checkpoints/``,
``adapter.safetensors``, ``summary.json``. The same command with the same ``name`` goes on from the newest whole
checkpoint; with a larger ``trainer.max_steps`` it goes on beyond the end.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from ipa.data.cache.format import WrongCache
from ipa.data.rejects import NoGoodSamples
from ipa.errors import UserError, brief
from ipa.export.loading import load_into
from ipa.files import write_atomically
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions
from ipa.training.callbacks import DataPosition, Throughput
from ipa.training.checkpointing import (
    BackgroundCheckpointIO,
    Checkpoints,
    checkpoints_in,
    newest_whole,
    read_checkpoint,
)
from ipa.training.configuration import settle_configuration
from ipa.training.guards import FiniteGuard
from ipa.training.loggers import log_configuration
from ipa.training.memory import causes, explain_memory
from ipa.training.module import AdapterTraining
from ipa.training.parts import build_model, check_parts
from ipa.training.previews import Column, HeldOutPrompts, Previews, generate_columns, score_pictures
from ipa.training.profiling import StepClock, StepProfile
from ipa.training.stopping import Signals, StopOnSignal, launcher_of
from ipa.training.strategies import AdapterFSDP

log = logging.getLogger(__name__)

PAPER_BATCH = 64  # samples in a step (Ye et al. 2023, section 4.1)

Scores = dict[str, dict[str, float]]


def train(cfg: DictConfig) -> None:
    """Run one training; raises UserError with a message for the user, Stopped after a signal."""
    if getattr(rank_zero_only, "rank", 0):  # the first process tells; the others tell what goes wrong
        logging.getLogger("ipa").setLevel(logging.ERROR)
    with Signals(cfg.stop.grace_s).listening() as signals:
        train_until_stopped(cfg, signals)


def train_until_stopped(cfg: DictConfig, signals: Signals) -> None:
    folder = Path(cfg.paths.run)
    start = where_to_start(folder / "checkpoints", cfg.resume)
    begins = start is None or start.parent != folder / "checkpoints"
    cfg = settle_configuration(cfg, folder, goes_on=not begins)
    if (reached := what_it_reached(folder, cfg.trainer.max_steps)) is not None:
        log.info("%s is finished; a larger trainer.max_steps= lets it go on. It reached:\n\n%s", folder, reached)
        return
    torch.set_float32_matmul_precision("high")
    if cfg.trainer.accelerator == "cpu":
        keep_freed_memory()
    # what can be refused without the weights of base and encoder is refused before them
    datamodule: Any = instantiate(cfg.data)
    check_parts(cfg, begins)
    callbacks = list(instantiate(cfg.callbacks).values())
    stop = StopOnSignal(signals)
    clock = StepClock()
    trainer = make_trainer(cfg, folder, [*callbacks, stop, *profiles(cfg, folder, clock)], clock)
    signals.launcher = launcher_of(trainer)
    for previews in (callback for callback in callbacks if isinstance(callback, Previews)):
        previews.interruptible = signals.obeying
    datamodule.batch_size = batch_size_of_each(cfg, trainer)
    datamodule.grace_s = cfg.stop.grace_s
    optimizer = scaled_optimizer(cfg, samples_per_step(datamodule.batch_size, trainer))
    L.seed_everything(cfg.seed, verbose=False)
    model = build_model(cfg)
    if cfg.adapter.init_from and start is None:
        load_into(model, Path(cfg.adapter.init_from))
    datamodule.fit_to(
        image_size_px=cfg.image_size_px or model.family.image_size_px,
        reference_size_px=model.encoder.image_size_px,
        latent_shape=model.family.latent_shape(cfg.image_size_px or model.family.image_size_px),
    )
    datamodule.check_model(model)
    metadata = {"licence": cfg.licence} if cfg.licence else {}
    module = AdapterTraining(model, instantiate(optimizer), instantiate(cfg.schedule), cfg.ema.decay, metadata)
    for logger in trainer.loggers:
        log_configuration(logger, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    log.info("training %s parameters in %s", f"{model.count_trainable():,}", folder)
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=start)
    except (NoGoodSamples, WrongCache) as error:  # a data worker's comes with the worker's traceback as its text
        raise type(error)(str(error).strip().rpartition(f"{type(error).__name__}: ")[2]) from error
    except (RuntimeError, MemoryError) as error:
        explain_compiler(error)
        explain_memory(error, cfg, trainer, datamodule)
        raise
    if stop.end is not None:
        raise stop.end
    model.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    with signals.obeying(), module.product():
        scores = final_scores(cfg, model, datamodule)
    if trainer.is_global_zero:
        report(cfg, folder, model, scores, trainer, callbacks)


def check_devices(cfg: DictConfig) -> None:
    """Raise UserError for devices that are not there, or none."""
    if cfg.trainer.accelerator in ("gpu", "cuda") and not (
        CUDAAccelerator.is_available() or MPSAccelerator.is_available()
    ):
        raise UserError(
            f"trainer.accelerator={cfg.trainer.accelerator}, but torch finds no GPU here: see whether nvidia-smi lists "
            "one and torch.version.cuda fits its driver; or give trainer.accelerator=cpu trainer.precision=32-true"
        )
    if cfg.trainer.devices in (0, "0"):
        raise UserError("trainer.devices=0: give the number of processes of each machine, 1 or more, or auto for GPUs")


def profiles(cfg: DictConfig, folder: Path, clock: StepClock) -> list[L.Callback]:
    return [StepProfile(folder / "profile", clock)] if cfg.profile else []


def make_trainer(cfg: DictConfig, folder: Path, callbacks: list[L.Callback], clock: StepClock) -> Any:
    check_devices(cfg)
    trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=list(instantiate(cfg.logger).values()),
        plugins=[BackgroundCheckpointIO()],
        profiler=clock,
        default_root_dir=folder,
    )
    check_compile(cfg, trainer.strategy)
    check_launcher(trainer.world_size)
    return trainer


def check_compile(cfg: DictConfig, strategy: Any) -> None:
    """Raise UserError where blocks cannot be compiled whole: FSDP puts their weights together as they are called."""
    if cfg.compile and isinstance(strategy, AdapterFSDP):
        raise UserError("compile=true cannot be had with trainer=fsdp or zero2: give one of them, or trainer=ddp")


def explain_compiler(error: BaseException) -> None:
    """Raise UserError if torch found no compiler for ``compile=true``; return otherwise."""
    kinds = {type(cause).__name__ for cause in causes(error)}
    if kinds & {"InvalidCxxCompiler", "TritonMissing"}:
        raise UserError(
            "compile=true needs a compiler: g++ for the CPU (or name one with CXX=…), Triton for a GPU, which comes "
            "with torch on Linux. Install it, or leave compile=false"
        ) from error


def check_launcher(world_size: int) -> None:
    """Raise UserError for a sweep whose jobs share this process, where Lightning would start the sweep once more."""
    if world_size > 1 and HydraConfig.get().mode == RunMode.MULTIRUN:  # the jobs of our own launchers are single runs
        launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
        raise UserError(
            f"hydra/launcher={launcher} runs all jobs of a sweep in one process, and cannot use {world_size} devices. "
            "Give hydra/launcher=processes, or submitit_slurm on a cluster"
        )


def scaled_optimizer(cfg: DictConfig, step_samples: int) -> DictConfig:
    """The optimizer's configuration with the learning rate for so many samples a step."""
    factor = rate_factor(cfg.scale_lr, step_samples)
    optimizer: Any = OmegaConf.merge(cfg.optimizer, {"lr": cfg.optimizer.lr * factor})
    if factor != 1:
        log.info("learning rate %g: optimizer.lr times %g, for %d samples a step", optimizer.lr, factor, step_samples)
    return optimizer


def batch_size_of_each(cfg: DictConfig, trainer: L.Trainer) -> int:
    """Samples per batch of one process: as given, or what makes ``global_batch_size`` of all; raises UserError."""
    if cfg.data.batch_size is not None:
        return cfg.data.batch_size
    parts = trainer.world_size * trainer.accumulate_grad_batches
    if cfg.global_batch_size % parts:
        raise UserError(
            f"global_batch_size={cfg.global_batch_size} cannot be shared by {trainer.world_size} processes × "
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: give a multiple of {parts}, or say "
            "data.batch_size, the samples of one process at a time"
        )
    return cfg.global_batch_size // parts


def samples_per_step(batch_size: int, trainer: L.Trainer) -> int:
    return batch_size * trainer.world_size * trainer.accumulate_grad_batches


def rate_factor(scaling: str | None, step_samples: int) -> float:
    """What the learning rate is multiplied with for this many samples a step; raises UserError for another word."""
    ratio = step_samples / PAPER_BATCH
    factors = {None: 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}
    if scaling not in factors:
        raise UserError(f"scale_lr={scaling}: give linear or sqrt, or null for optimizer.lr as it stands")
    return factors[scaling]


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free: page faults cost a CPU about a seventh of its samples (glibc only)."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2_000_000_000)
        mallopt(top_pad, 100_000_000)


def where_to_start(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from; None to begin. Raises UserError where that would lose something, or is a bad file.

    ``resume`` is auto, never, or a file that is taken until the run has checkpoints of its own.
    """
    there = checkpoints_in(folder)
    if resume == "never" and there:
        raise UserError(f"resume=never, but {folder} has checkpoints: give another name=, or leave resume=auto")
    newest = newest_whole(folder)
    if newest is None and there:
        raise UserError(
            f"none of the {len(there)} checkpoints in {folder} is whole, see above; to begin anew, move them away"
        )
    if newest is not None or resume in ("auto", "never"):
        return newest
    if not Path(resume).is_file():
        raise UserError(
            f"resume={resume}: no such checkpoint. Give auto, never, or a file as runs/…/checkpoints/step_00000600.ckpt"
        )
    read_checkpoint(Path(resume))
    return Path(resume)


def what_it_reached(folder: Path, max_steps: int) -> str | None:
    """The summary of a run that made this many steps; None for one that did not, or has no summary that can be read."""
    path = folder / "summary.json"
    if not (checkpoints_in(folder / "checkpoints") and path.is_file()):
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return describe(summary) if summary["steps"] >= max_steps else None
    except (ValueError, TypeError, LookupError, AttributeError, StopIteration, RecursionError) as error:
        log.warning("%s is damaged (%s), so it is made again", path, brief(error))
        return None


def report(
    cfg: DictConfig, folder: Path, model: IPAdapterModel, scores: Scores, trainer: L.Trainer, callbacks: list[Any]
) -> None:
    """Print and save what the run reached, and what to try next."""
    throughput = next((c for c in callbacks if isinstance(c, Throughput)), None)
    previews = next((c for c in callbacks if isinstance(c, Previews)), None)
    checkpoints = next((c for c in callbacks if isinstance(c, Checkpoints)), None)
    data = next((c for c in callbacks if isinstance(c, DataPosition)), None)
    guard = next((c for c in callbacks if isinstance(c, FiniteGuard)), None)
    speed = throughput and round(throughput.mean_samples_per_s, 1)
    summary: dict[str, Any] = {
        "parameters trained": model.count_trainable(),
        "steps": trainer.global_step,
        "samples per second": speed if speed and math.isfinite(speed) else None,
        "samples rejected": sum(data.rejects.values()) if data else None,
        "steps skipped": guard.skipped if guard and guard.skips else None,
        "best checkpoint": str(checkpoints.best_path) if checkpoints and checkpoints.best_path else None,
        "last preview": str(previews.last) if previews and previews.last else None,
        "adapter": str(folder / "adapter.safetensors"),
    }
    if cfg.scoring is not None and cfg.scoring.scorer is not None:
        summary["scores"] = scores
    write_atomically(folder / "summary.json", lambda beside: beside.write_text(json.dumps(summary, indent=2) + "\n"))
    log.info("\n%s", describe(summary))
    if cfg.next_command:
        log.info("\nNext: %s", cfg.next_command.replace("RUN", str(folder)))


def final_scores(cfg: DictConfig, model: IPAdapterModel, datamodule: Any) -> Scores:
    """Scores over the held-out prompts with the empty text: without the image (λ = 0) and with it (λ = 1).

    To be called by all ranks, which share the work; the first gets them.
    """
    if cfg.scoring is None or cfg.scoring.scorer is None:
        return {}
    prompts = HeldOutPrompts.find(datamodule, cfg.preview.images, cfg.scoring.num_prompts)
    if prompts is None:
        return {}
    options: SamplingOptions = instantiate(cfg.scoring.options)
    log.info("scoring %d held-out image prompts, without and with the image …", len(prompts))
    columns = [Column(prompts, options.with_scale(scale), cfg.scoring.seed) for scale in (0.0, 1.0)]
    pictures = generate_columns(model, columns)
    if not pictures:
        return {}  # the first rank has them
    scorer = instantiate(cfg.scoring.scorer)
    return {
        f"scale {column.options.scale:g}": score_pictures(scorer, prompts, pixels, model.device)
        for column, pixels in zip(columns, pictures, strict=True)
    }


def describe(summary: dict[str, Any]) -> str:
    """The summary as lines for the console, with the scores as a small table."""
    lines = [f"{name:20} {value}" for name, value in summary.items() if name != "scores" and value is not None]
    scores = summary.get("scores") or {}
    if scores:
        names = list(next(iter(scores.values())))
        lines += ["", f"{'held-out prompts':20}" + "".join(f"{name:>16}" for name in names)]
        lines += [f"{row:20}" + "".join(f"{values[name]:16.3f}" for name in names) for row, values in scores.items()]
    return "\n".join(lines)
