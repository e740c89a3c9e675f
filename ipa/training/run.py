"""`python train.py`: build the parts from the configuration, fit, and report the result."""

from __future__ import annotations

import ctypes
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from ipa.errors import UserError, brief
from ipa.export.loading import load_into
from ipa.families.quantization import TORCHAO
from ipa.files import read_json, write_json
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions
from ipa.training.callbacks import DataPosition, SameParts, Throughput
from ipa.training.checkpointing import BackgroundCheckpointIO, Checkpoints, where_to_start
from ipa.training.configuration import settle_configuration
from ipa.training.dry_run import QUANTIZING, dry_run
from ipa.training.failures import LOST_PIPE, explain_fit_failure
from ipa.training.guards import FiniteGuard
from ipa.training.heldout import HeldOutGap
from ipa.training.hooks import callbacks_of, in_order
from ipa.training.loggers import log_configuration, log_scores
from ipa.training.module import AdapterTraining
from ipa.training.monitors import ImagePromptGuard
from ipa.training.optimizers import check_optimizer, check_same_optimizer
from ipa.training.owner import owning
from ipa.training.parts import build_model, check_average, check_parts, check_texts, names_of_parts
from ipa.training.previews import Column, HeldOutPrompts, Previews, generate_columns, score_pictures
from ipa.training.profiling import StepClock, StepProfile
from ipa.training.stopping import Signals, StopOnSignal, launcher_of
from ipa.training.strategies import AdapterFSDP, environment_plugins

log = logging.getLogger(__name__)

# M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
MALLOC_OPTIONS = {-3: 1 << 30, -1: 2_000_000_000, -2: 100_000_000}
PAPER_BATCH = 64  # samples of a step (Ye et al. 2023, section 4.1)

Scores = dict[str, dict[str, float]]


def train(cfg: DictConfig) -> None:
    """Run one training; raises UserError, or Stopped after a signal."""
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        logging.getLogger("ipa").setLevel(logging.ERROR)  # the first process logs for all
    folder = Path(cfg.paths.run)
    cfg.name = folder.name
    if cfg.dry_run:
        log.info("%s", dry_run(cfg))
        return
    with Signals(cfg.stop.grace_s).listening() as signals, owning(folder):
        train_until_stopped(cfg, folder, signals)


def train_until_stopped(cfg: DictConfig, folder: Path, signals: Signals) -> None:
    check_devices(cfg)
    start = where_to_start(folder / "checkpoints", cfg.resume)
    resumes = start is not None and start.parent == folder / "checkpoints"
    cfg, moved = settle_configuration(cfg, folder, resumes)
    if resumes and (summary := finished_summary(folder, cfg.trainer.max_steps)):
        log.info(
            "%s is finished; a larger trainer.max_steps= resumes it unless it stopped early, another name= starts "
            "anew. Its result:\n\n%s",
            *(folder, summary),
        )
        return
    set_up_torch(cfg)
    datamodule: Any = instantiate(cfg.data)
    check_parts(cfg, None if resumes else start or cfg.adapter.init_from)  # before any weight is read
    check_texts(cfg, datamodule.texts)
    check_optimizer(cfg)
    if start is not None and not resumes:
        check_average(cfg, start)
        check_same_optimizer(cfg, start)
    log.info("loading %s", ", ".join(names_of_parts(cfg)))
    stop, same = StopOnSignal(signals), SameParts(moved)
    trainer = make_trainer(cfg, folder, stop, same)
    datamodule.batch_size = batch_size_per_process(cfg, trainer)
    datamodule.grace_s = cfg.stop.grace_s
    module = build_module(cfg, datamodule, trainer, start)
    if same.needs_hashes(resumes) and trainer.is_global_zero:
        same.frozen = module.model.frozen_hash()
    for logger in trainer.loggers:
        log_configuration(logger, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    log.info("training %s parameters in %s", f"{count_trained(module.model):,}", folder)
    fit(cfg, trainer, module, datamodule, start)
    if stop.end is not None:
        raise stop.end
    module.model.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    with signals.interrupting(), module.product():
        scores = final_scores(cfg, module.model, datamodule)
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            log_scores(logger, scores)
        report(cfg, folder, summarise(folder, module.model, trainer), scores)


def finished_summary(folder: Path, max_steps: int) -> str | None:
    """The summary of a run that made this many steps; None if it did not, or if its summary cannot be read."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        summary = read_json(path)
        is_finished = summary["steps"] >= max_steps or summary.get("stopped early")
        return describe(summary) if is_finished else None
    except (UserError, ValueError, TypeError, LookupError, AttributeError) as error:
        log.warning("%s is damaged (%s), so it is made again", path, brief(error))
        return None


def set_up_torch(cfg: DictConfig) -> None:
    torch.set_float32_matmul_precision("high")
    if cfg.trainer.accelerator == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors: page faults cost a CPU about a seventh of its throughput."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in MALLOC_OPTIONS.items():
            mallopt(option, value)


def make_trainer(cfg: DictConfig, folder: Path, stop: StopOnSignal, *callbacks_of_run: L.Callback) -> L.Trainer:
    clock = StepClock()
    callbacks = list(instantiate(cfg.callbacks).values())
    callbacks += [StepProfile(folder / "profile", clock)] if cfg.profile else []
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        callbacks=[*in_order([*callbacks, *callbacks_of_run]), stop],
        logger=list(instantiate(cfg.logger).values()),
        plugins=[BackgroundCheckpointIO(), *environment_plugins()],
        profiler=clock,
        default_root_dir=folder,
    )
    check_strategy(cfg, trainer.strategy)
    check_launcher(trainer.world_size)
    stop.signals.launcher = launcher_of(trainer)
    for previews in callbacks_of(trainer, Previews):
        previews.interruptible = stop.signals.interrupting
    return trainer


def build_module(cfg: DictConfig, datamodule: Any, trainer: L.Trainer, start: Path | None) -> AdapterTraining:
    """Load the model, initialise it if the run starts anew, and give the datamodule its sizes."""
    step_samples = datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    optimizer = instantiate(scaled_optimizer(cfg, step_samples))
    L.seed_everything(cfg.seed, verbose=False)  # loading the judge draws random numbers, too
    model = build_model(cfg, datamodule.texts)
    if cfg.adapter.init_from and start is None:
        load_into(model, Path(cfg.adapter.init_from))
    size_px = cfg.image_size_px or model.family.image_size_px
    shape = model.family.latent_shape(size_px)
    datamodule.fit_to(image_size_px=size_px, reference_size_px=model.encoder.image_size_px, latent_shape=shape)
    datamodule.check_model(model)
    return AdapterTraining(model, optimizer, instantiate(cfg.schedule), cfg.ema.decay, own_metadata(cfg))


def own_metadata(cfg: DictConfig) -> dict[str, str]:
    """What the configuration adds to the adapter file's metadata."""
    licence = {} if cfg.licence is None else {"licence": str(cfg.licence)}  # Hydra reads 4.0 as a number
    return instantiate(cfg.sampling).describe() | licence


def scaled_optimizer(cfg: DictConfig, step_samples: int) -> DictConfig:
    """The optimizer's configuration with the learning rate for this many samples per step."""
    factor = learning_rate_factor(cfg.scale_lr, step_samples) * cfg.lr_factor
    optimizer: Any = OmegaConf.merge(cfg.optimizer, {"lr": cfg.optimizer.lr * factor})
    if factor != 1:
        log.info("learning rate %g: optimizer.lr times %g, for %d samples per step", optimizer.lr, factor, step_samples)
    return optimizer


def learning_rate_factor(scaling: str | None, step_samples: int) -> float:
    ratio = step_samples / PAPER_BATCH
    factors = {None: 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}
    if scaling not in factors:
        raise UserError(f"scale_lr={scaling}: give linear or sqrt, or null to use optimizer.lr unchanged")
    return factors[scaling]


def batch_size_per_process(cfg: DictConfig, trainer: L.Trainer) -> int:
    """``data.batch_size``, or the process's part of ``global_batch_size``; raises UserError if that is not whole."""
    if cfg.data.batch_size is not None:
        return cfg.data.batch_size
    parts = trainer.world_size * trainer.accumulate_grad_batches
    if cfg.global_batch_size % parts:
        raise UserError(
            f"global_batch_size={cfg.global_batch_size} cannot be divided by {trainer.world_size} processes × "
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: give a multiple of {parts}, or "
            "data.batch_size, the samples of one process per batch"
        )
    return cfg.global_batch_size // parts


def check_devices(cfg: DictConfig) -> None:
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise UserError(
            f"trainer.accelerator={cfg.trainer.accelerator}, but torch finds no GPU: check that nvidia-smi lists one "
            "and that torch.version.cuda fits its driver; or give trainer.accelerator=cpu trainer.precision=32-true"
        )


def check_strategy(cfg: DictConfig, strategy: Strategy) -> None:
    """Raise UserError for what does not work with FSDP, ZeRO-2 or `torch.compile`."""
    quantizing = [f"base.{name}={cfg.base[name]}" for name in QUANTIZING if cfg.base.get(name)]
    reasons = dict.fromkeys(quantizing, "shard weights in their own dtype")
    reasons |= {"compile=true": "gather weights while a block runs"} if cfg.compile else {}
    if reasons and isinstance(strategy, AdapterFSDP):
        option, reason = reasons.popitem()
        raise UserError(
            f"{option} does not work with trainer=fsdp or zero2, which {reason}: give one of them, or trainer=ddp"
        )
    if cfg.compile and (scheme := cfg.base.get("quantization")) in TORCHAO:
        raise UserError(
            f"compile=true does not work with base.quantization={scheme}: torch does not compile the backward pass of "
            "torchao's tensors. Give one of them, or a .gguf file as base.transformer_file"
        )


def check_launcher(world_size: int) -> None:
    """Raise UserError for a sweep whose jobs share this process: Lightning would start the whole sweep again."""
    if world_size > 1 and HydraConfig.get().mode == RunMode.MULTIRUN:  # the jobs of our own launchers are single runs
        launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
        raise UserError(
            f"hydra/launcher={launcher} runs all jobs of a sweep in one process, which cannot use {world_size} "
            "devices. Give hydra/launcher=processes, or submitit_slurm on a cluster"
        )


def fit(cfg: DictConfig, trainer: L.Trainer, module: AdapterTraining, datamodule: Any, start: Path | None) -> None:
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=start)
    except (UserError, RuntimeError, MemoryError, *LOST_PIPE) as error:
        explain_fit_failure(error, cfg, trainer, datamodule)
        raise


def final_scores(cfg: DictConfig, model: IPAdapterModel, datamodule: Any) -> Scores:
    """Scores over the held-out prompts, empty text, λ = 0 and 1; all ranks share the work, the first gets them."""
    if not is_scored(cfg):
        return {}
    prompts = HeldOutPrompts.find(datamodule, cfg.preview.images, cfg.scoring.num_prompts)
    if prompts is None:
        return {}
    options: SamplingOptions = instantiate(cfg.scoring.options)
    log.info("scoring %d held-out image prompts, without and with the image …", len(prompts))
    columns = [Column(prompts, options.with_scale(scale), cfg.scoring.seed) for scale in (0.0, 1.0)]
    pictures = generate_columns(model, columns)
    if not pictures:
        return {}
    scorer = instantiate(cfg.scoring.scorer)
    return {
        f"scale {column.options.scale:g}": score_pictures(scorer, prompts, pixels, model.device)
        for column, pixels in zip(columns, pictures, strict=True)
    }


def is_scored(cfg: DictConfig) -> bool:
    return cfg.scoring is not None and cfg.scoring.scorer is not None and cfg.scoring.num_prompts > 0


def summarise(folder: Path, model: IPAdapterModel, trainer: L.Trainer) -> dict[str, Any]:
    speeds = [c.mean_samples_per_s for c in callbacks_of(trainer, Throughput)]
    return {
        "parameters trained": count_trained(model),
        "steps": trainer.global_step,
        "samples per second": next((round(speed, 1) for speed in speeds if math.isfinite(speed)), None),
        "samples rejected": next((sum(c.rejects.values()) for c in callbacks_of(trainer, DataPosition)), None),
        "rejected because": next((dict(c.rejects) for c in callbacks_of(trainer, DataPosition) if c.rejects), None),
        "steps skipped": next((c.skipped for c in callbacks_of(trainer, FiniteGuard) if c.skips), None),
        "best checkpoint": next((str(c.best_path) for c in callbacks_of(trainer, Checkpoints) if c.best_path), None),
        "last preview": next((str(c.last) for c in callbacks_of(trainer, Previews) if c.last), None),
        "image attention": next((c.attention for c in callbacks_of(trainer, ImagePromptGuard) if c.attention), None),
        **describe_heldout(callbacks_of(trainer, HeldOutGap)),
        "adapter": str(folder / "adapter.safetensors"),
    }


def describe_heldout(watchers: Sequence[HeldOutGap]) -> dict[str, Any]:
    """Where the gap of held-out samples was largest, if it was measured."""
    watched = next((each for each in watchers if each.best["gap"] is not None), None)
    if watched is None:
        return {}
    best = f"{watched.path}, step {watched.best['step']}, held-out gap {watched.best['gap']:.4f}"
    return {"stopped early": watched.has_stopped or None, "best adapter": best}


def count_trained(model: IPAdapterModel) -> int:
    return sum(parameter.numel() for parameter in model.trained())


def report(cfg: DictConfig, folder: Path, summary: dict[str, Any], scores: Scores) -> None:
    """Save and log the summary, and the next command."""
    if is_scored(cfg):
        summary["scores"] = scores
    write_json(folder / "summary.json", summary, indent=2)
    log.info("\n%s", describe(summary))
    if cfg.next_command:
        log.info("\nNext: %s", cfg.next_command.replace("RUN", str(folder)).replace("TEXT", cfg.preview.text or ""))


def describe(summary: dict[str, Any]) -> str:
    """The summary as lines for the console, with the scores as a small table."""
    lines = [
        f"{name:20} {in_words(value)}" for name, value in summary.items() if name != "scores" and value is not None
    ]
    if scores := summary.get("scores"):
        names = list(next(iter(scores.values())))
        lines += ["", f"{'held-out prompts':20}" + "".join(f"{name:>16}" for name in names)]
        lines += [f"{row:20}" + "".join(f"{values[name]:16.3f}" for name in names) for row, values in scores.items()]
    return "\n".join(lines)


def in_words(value: Any) -> str:
    """A mapping as its entries, numbers rounded."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name} ({round(number, 3)})" for name, number in value.items())
