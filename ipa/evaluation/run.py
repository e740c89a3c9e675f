"""`python evaluate.py`: one system on one benchmark; pictures first, then scores."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from ipa.evaluation.generation import begin, device_name, finish, generate, manifest, skip, write_items
from ipa.evaluation.items import Benchmark, Task, plan
from ipa.evaluation.methods.method import Method, MissingWeights, Sampling
from ipa.evaluation.scoring import score

log = logging.getLogger(__name__)

# what changes no picture, or is told by the folder, and so stays out of a label
UNNAMED = {
    *("benchmark", "out", "label", "device", "generate", "name", "num_seeds"),
    *("paths", "metrics", "hydra", "method", "sweep"),
}


def evaluate(cfg: DictConfig) -> None:
    """Run one system; raises ValueError or OSError with a message for the user.

    Missing weights are no failure: the folder then says what to download, and so does the report.
    """
    label, out = cfg.label or label_of(cfg), Path(cfg.out)
    benchmark: Benchmark = instantiate(cfg.benchmark)
    items = benchmark.items()
    if not items:
        raise ValueError(f"benchmark={benchmark.name} has no items: {benchmark.settings}")
    tasks = plan(items, cfg.num_seeds, cfg.seed, cfg.prompt)
    write_items(out, benchmark, items, cfg.num_seeds)
    read = functools.lru_cache(maxsize=256)(benchmark.read)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = out / label
    try:
        complete = not cfg.generate or make_pictures(cfg, folder, label, tasks, read, device)
    except MissingWeights as error:
        log.warning("%s skipped: %s", label, error)
        skip(folder, label, name_of(cfg.method), str(error))
        return
    if not complete:
        log.info("%s: this process is done, others still make pictures; the last one scores them", label)
        return
    scores = score(folder, tasks, read, metrics_of(cfg), OmegaConf.to_container(cfg.metrics), device)  # type: ignore[arg-type]
    log.info("\n%s", describe(label, scores))
    log.info("\nNext: python -m ipa.tools.report %s", out)


def make_pictures(cfg: DictConfig, folder: Path, label: str, tasks: Sequence[Task], read: Any, device: str) -> bool:
    """Generate this process's share; whether all pictures are there now."""
    sampling: Sampling = instantiate(cfg.sampling)
    rank, world = share()
    method: Method = make(cfg.method)
    asked = manifest(
        label,
        method,
        sampling,
        tasks,
        cfg.batch_size,
        prompt=cfg.prompt,
        seed=cfg.seed,
        num_seeds=cfg.num_seeds,
        settings=OmegaConf.to_container(cfg.method, resolve=True),
    )
    begin(folder, asked)
    placed = f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device
    started = time.perf_counter()
    generate(folder, method.to(placed), tasks, read, sampling, cfg.batch_size, rank, world)
    return finish(folder, tasks, time.perf_counter() - started, device_name(placed))


def make(part: DictConfig) -> Any:
    """A part from its configuration; what the system refuses keeps its own kind: OSError, ``MissingWeights``."""
    try:
        return instantiate(part)
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if isinstance(cause, OSError):
            raise cause from error
        raise


def share() -> tuple[int, int]:
    """Rank and number of processes, as torchrun or Slurm say."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def metrics_of(cfg: DictConfig) -> dict[str, Any]:
    return {str(name): functools.partial(make, metric) for name, metric in cfg.metrics.items()}


def name_of(method: DictConfig) -> str:
    return get_class(method._target_.rpartition(".")[0]).name  # type: ignore[attr-defined]


def label_of(cfg: DictConfig) -> str:
    """The method, and what of the command line makes its pictures others: ip_adapter-simple_global-scale0.5."""
    hydra: Any = HydraConfig.get()
    adapters, others = [], []
    for override in hydra.overrides.task:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "adapter":
            if cfg.method.get("adapter") == cfg.adapter:  # other systems do not read it
                adapters.append(name_of_adapter(Path(value)))
        elif key.partition(".")[0].partition("@")[0] not in UNNAMED or key.startswith("method."):
            others.append(f"{key.rpartition('.')[2]}{value}")
    return "-".join([hydra.runtime.choices.method, *adapters, *others]).replace("/", "_")


def name_of_adapter(path: Path) -> str:
    """A run's file is called as all runs' are: then its folder's names say which."""
    return path.stem if path.stem != "adapter" else "-".join(path.parts[-3:-1])


def describe(label: str, scores: dict[str, Any]) -> str:
    lines = [label]
    for name, entry in scores["metrics"].items():
        interval = f"  [{entry['low']:.4f}, {entry['high']:.4f}]" if "low" in entry else ""
        lines.append(f"    {name:20} {entry['value']:.4f}{interval}")
    lines += [f"    {name:20} missing: {reason}" for name, reason in scores["missing"].items()]
    return "\n".join(lines)
