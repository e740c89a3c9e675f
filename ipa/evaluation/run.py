"""`python evaluate.py`: one system on one benchmark; pictures first, then scores."""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from ipa.errors import UserError
from ipa.evaluation.generation import begin, check_made, device_name, finish, generate, manifest, skip, write_items
from ipa.evaluation.items import PROMPTS, Benchmark, Task, plan
from ipa.evaluation.methods.method import Method, MissingWeights, Sampling
from ipa.evaluation.scoring import score
from ipa.files import hash_file

log = logging.getLogger(__name__)

# what changes no picture, or is told by the folder, and so stays out of a label
UNNAMED = {
    *("benchmark", "out", "label", "device", "generate", "name", "num_seeds"),
    *("paths", "judge", "metric", "metrics", "hydra", "method", "sweep"),
}
# what else is in a benchmark's folder
TAKEN = ("references", "jobs", "wandb")
LONGEST_LABEL = 200  # file systems have names of 255 bytes
READ_AHEAD = 32  # image prompts that are kept, since those of a batch belong together


def evaluate(cfg: DictConfig) -> None:
    """Run one system; raises UserError with a message for the user.

    Missing weights are no failure: the folder then says what to download, and so does the report.
    """
    label, out = cfg.label or label_of(cfg), Path(cfg.out)
    if complaints := [*complaints_about(cfg), *complaints_about_label(label)]:
        raise UserError("\n".join(complaints))
    device = choose_device(cfg.device)
    benchmark: Benchmark = instantiate(cfg.benchmark)
    items = benchmark.items()
    if not items:
        raise UserError(f"benchmark={benchmark.name} has no items: {benchmark.settings}")
    tasks = plan(items, cfg.num_seeds, cfg.seed, cfg.prompt)
    write_items(out, benchmark, items, cfg.num_seeds)
    read = functools.lru_cache(maxsize=READ_AHEAD)(benchmark.read)
    folder = out / label
    try:
        complete = is_made(cfg, folder, label, benchmark, tasks, read, device)
    except MissingWeights as error:
        log.warning("%s skipped: %s", label, error)
        if not skip(folder, label, name_of(cfg.method), str(error)):
            log.warning("Pictures that are there can be scored without them: generate=false")
        return
    if not complete:
        log.info("%s: this process is done, others still make pictures; the last one scores them", label)
        return
    settings: Any = OmegaConf.to_container(cfg.metrics, resolve=True)  # with the judge, so that another is noticed
    scores = score(folder, tasks, read, metrics_of(cfg), settings, device)
    log.info("\n%s", describe(label, scores))
    log.info("\nNext: python -m ipa.tools.report %s", out)


def is_made(
    cfg: DictConfig, folder: Path, label: str, benchmark: Benchmark, tasks: Sequence[Task], read: Any, device: str
) -> bool:
    """Whether all pictures are there, after this process made its share, or with ``generate=false`` as they are."""
    if cfg.generate:
        return make_pictures(cfg, folder, label, benchmark, tasks, read, device)
    check_made(folder, benchmark, tasks)
    return share()[0] == 0  # of several processes one scores


def make_pictures(
    cfg: DictConfig, folder: Path, label: str, benchmark: Benchmark, tasks: Sequence[Task], read: Any, device: str
) -> bool:
    """Generate this process's share; whether all pictures are there now."""
    sampling: Sampling = instantiate(cfg.sampling)
    rank, world = share()
    method: Method = make(cfg.method)
    asked = manifest(
        label,
        benchmark,
        method,
        sampling,
        tasks,
        cfg.batch_size,
        prompt=cfg.prompt,
        seed=cfg.seed,
        num_seeds=cfg.num_seeds,
        settings=OmegaConf.to_container(cfg.method, resolve=True),
        files=hashes_of_files(cfg.method),
    )
    begin(folder, asked)
    placed = f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device
    started = time.perf_counter()
    generate(folder, method.to(placed), tasks, read, sampling, cfg.batch_size, rank, world)
    return finish(folder, tasks, time.perf_counter() - started, device_name(placed))


def complaints_about(cfg: DictConfig) -> Iterator[str]:
    """What cannot be, of all that is a plain value, before anything is loaded."""
    wholes = {"num_seeds": cfg.num_seeds, "batch_size": cfg.batch_size, "sampling.num_steps": cfg.sampling.num_steps}
    optional = {"benchmark.limit": cfg.benchmark.get("limit"), "sampling.image_size_px": cfg.sampling.image_size_px}
    for name, value in {**wholes, **{name: value for name, value in optional.items() if value is not None}}.items():
        if not (is_whole(value) and value >= 1):
            yield f"{name}={value}: a whole number from 1"
        elif name == "sampling.image_size_px" and value % 8:
            yield f"{name}={value}: a multiple of 8, the pixels of a latent"
    if not (is_whole(cfg.seed) and cfg.seed >= 0):
        yield f"seed={cfg.seed}: a whole number from 0"
    for name in ("scale", "guidance"):
        value = cfg.sampling[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            yield f"sampling.{name}={value}: a number"
    if cfg.prompt not in PROMPTS:
        yield f"prompt={cfg.prompt}: one of {', '.join(PROMPTS)}"


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def complaints_about_label(label: Any) -> Iterator[str]:
    """A label is the name of one folder."""
    name = str(label)
    if name in TAKEN or name.startswith(".") or {"/", "\\"} & set(name):
        yield f"label={name}: the name of a folder for this system, without slashes, and not {', '.join(TAKEN)}"
    elif len(name.encode()) > LONGEST_LABEL:
        yield f"label={name} is too long for a folder's name: say label=SHORTER"


def choose_device(asked: str | None) -> str:
    """Raises UserError for what torch does not know or does not find here."""
    device = str(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device}: null for a GPU if there is one, cpu, cuda, cuda:1 …") from error
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise UserError(f"device={device}: torch finds {count} GPUs here; device=null takes what there is")
    return device


def hashes_of_files(method: DictConfig) -> dict[str, str]:
    """SHA-256 of the weights that are given as files: one that was trained further is another system."""
    return {str(name): hash_file(Path(value)) for name, value in method.items() if is_file(value)}


def is_file(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_file()


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
    return "-".join(path.parts[-3:-1]) or path.stem if path.stem == "adapter" else path.stem


def describe(label: str, scores: dict[str, Any]) -> str:
    lines = [label]
    for name, entry in scores["metrics"].items():
        interval = f"  [{entry['low']:.4f}, {entry['high']:.4f}]" if "low" in entry else ""
        lines.append(f"    {name:20} {entry['value']:.4f}{interval}")
    lines += [f"    {name:20} missing: {reason}" for name, reason in scores["missing"].items()]
    return "\n".join(lines)
