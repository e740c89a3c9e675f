"""`python evaluate.py`: one system on one benchmark; images first, then scores."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from ipa.errors import MissingWeights, UserError, causes
from ipa.evaluation.benchmarks import PROMPTS, Benchmark, plan
from ipa.evaluation.generation import begin, check_made, finish, generate, manifest, skip, write_items
from ipa.evaluation.methods.method import Method
from ipa.evaluation.scoring import score
from ipa.files import hash_file, is_hub_id
from ipa.overrides import as_typed
from ipa.sampling import SamplingOptions
from ipa.weights import choose_device

log = logging.getLogger(__name__)

# options that change no image, or that the folder shows already: they are not part of a label
NOT_IN_LABEL = {
    *("benchmark", "out", "label", "device", "generate", "name", "num_seeds"),
    *("paths", "judge", "metric", "metrics", "hydra", "method", "sweep"),
}
RESERVED_LABELS = ("references", "jobs", "wandb")  # other folders next to the systems'
MAX_LABEL_BYTES = 200  # file systems allow 255
MAX_PROMPTS_IN_MEMORY = 32
HUB_TIMEOUT_S = 5.0
ADAPTER = "adapter.safetensors"  # in a run's folder


def evaluate(cfg: DictConfig) -> None:
    """Run one system; raises UserError. If its weights are missing, the folder records what to download."""
    if cfg.adapter is not None and (file := Path(cfg.adapter) / ADAPTER).is_file():
        cfg.adapter = str(file)  # of a run's folder
    label, out = cfg.label or label_of(cfg), Path(cfg.out)
    if problems := list(problems_in(cfg, str(label))):
        raise UserError("\n".join(problems))
    sampling: SamplingOptions = make(cfg.sampling)
    method_class(cfg.method).check(sampling)
    rank, world = rank_and_world(os.environ)
    device = choose_device(cfg.device, rank)
    benchmark: Benchmark = instantiate(cfg.benchmark)
    items = benchmark.items()
    if not items:
        raise UserError(f"benchmark={benchmark.name} has no items: {benchmark.settings}")
    tasks = plan(items, cfg.num_seeds, cfg.seed, cfg.prompt)
    ask_hub(cfg)
    write_items(out, benchmark, items, cfg.num_seeds)
    read, folder = functools.lru_cache(maxsize=MAX_PROMPTS_IN_MEMORY)(benchmark.read), out / label
    if cfg.generate:
        method = load_or_skip(cfg.method, folder, label)
        if method is None:
            return
        begin(folder, manifest(label, benchmark, method, sampling, tasks, **settings_of(cfg)))
        started = time.perf_counter()
        generate(folder, method.to(device), tasks, read, sampling, rank, world)
        is_last = finish(folder, tasks, time.perf_counter() - started, device)
    else:
        check_made(folder, benchmark, tasks)
        is_last = rank == 0
    if not is_last:
        log.info("%s: this process is done; the last one to finish computes the scores", label)
        return
    log.info("\n%s", describe(label, score(folder, tasks, read, cfg.metrics, make, device)))
    log.info("\nNext: python -m ipa.tools.report %s", out)


def ask_hub(cfg: DictConfig) -> None:
    """Without the hub, log before the first image which metrics will be missing.

    It is asked once, and only if something may be there: without a network its libraries retry every file for half a
    minute.
    """
    from huggingface_hub import constants, get_session

    if not any(may_be_on_hub(OmegaConf.to_container(cfg[name], resolve=True)) for name in ("metrics", "method")):
        return
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
        except Exception as error:  # the session's library decides on the class
            log.warning("%s does not answer (%s): only what is on this machine is used", constants.ENDPOINT, error)
            constants.HF_HUB_OFFLINE = True
    for name in cfg.metrics if constants.HF_HUB_OFFLINE else ():
        try:
            make(cfg.metrics[name])
        except MissingWeights as error:
            log.warning("%s will be missing: %s", name, error)


def may_be_on_hub(node: Any, name: str = "") -> bool:
    """Whether a configuration has an owner/name, or a tag of open_clip's weights, that is not a local path."""
    if isinstance(node, Mapping):
        return any(may_be_on_hub(child, key) for key, child in node.items())
    is_remote = isinstance(node, str) and not Path(node).exists()
    return is_remote and (name == "pretrained" or is_hub_id("/".join(node.split("/")[:2])))


def load_or_skip(method: DictConfig, folder: Path, label: str) -> Method | None:
    """The system; None, with a record of what to download, if its weights are missing."""
    try:
        return make(method)
    except MissingWeights as error:
        log.warning("%s skipped: %s", label, error)
        if not skip(folder, label, method_class(method).name, str(error)):
            log.warning("To score the images that are already there: generate=false")
        return None


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """The other options that determine the images, with the SHA-256 of weights that were given as files."""
    paths = {str(name): Path(value) for name, value in cfg.method.items() if isinstance(value, str)}
    return {
        "prompt": cfg.prompt,
        "seed": cfg.seed,
        "num_seeds": cfg.num_seeds,
        "settings": OmegaConf.to_container(cfg.method, resolve=True),
        "files": {name: hash_file(path) for name, path in paths.items() if path.is_file()},
    }


def problems_in(cfg: DictConfig, label: str) -> Iterator[str]:
    """Problems that ``ipa.ranges`` does not check, before anything is loaded; a label names one folder."""
    if (cfg.sampling.image_size_px or 0) % 8:
        yield f"sampling.image_size_px={cfg.sampling.image_size_px}: a multiple of 8, the pixels of a latent"
    if cfg.prompt not in PROMPTS:
        yield f"prompt={cfg.prompt}: one of {', '.join(PROMPTS)}"
    if cfg.adapter is not None and not Path(cfg.adapter).is_file():
        yield f"adapter={cfg.adapter}: no such file; a run's is RUN/adapter.safetensors, others are in demo/adapters/"

    if label in RESERVED_LABELS or label.startswith(".") or {"/", "\\"} & set(label):
        yield f"label={label}: give the name of a folder, without slashes, other than {', '.join(RESERVED_LABELS)}"
    elif len(label.encode()) > MAX_LABEL_BYTES:
        yield f"label={label} is too long for a folder's name: give label=SHORTER"


def rank_and_world(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun or srun set them.

    Raises UserError for one process in a Slurm allocation of several tasks.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    tasks = int(environment.get("SLURM_NTASKS", 1))
    if tasks == 1:
        return 0, 1
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) != tasks:  # set by srun for the tasks that it starts
        raise UserError(
            f"this is one process in a Slurm allocation of {tasks} tasks: start all of them with `srun python "
            "evaluate.py …`, or one with `srun --ntasks=1 python evaluate.py …`"
        )
    return int(environment["SLURM_PROCID"]), tasks


def make(part: DictConfig) -> Any:
    """Instantiate a part; its own UserError is raised without Hydra's exception around it."""
    try:
        return instantiate(part)
    except InstantiationException as error:
        if found := [cause for cause in causes(error) if isinstance(cause, UserError)]:
            raise found[0] from error
        raise


def method_class(method: DictConfig) -> type[Method]:
    return get_class(method._target_.removesuffix(".from_pretrained"))


def label_of(cfg: DictConfig) -> str:
    """The method and the options that change its images: ip_adapter-simple_global-scale0.5."""
    hydra: Any = HydraConfig.get()
    adapters, others = [], []
    for override in as_typed(hydra.overrides.task):
        key, _, value = override.lstrip("+~").partition("=")
        if key == "adapter":
            if cfg.method.get("adapter") == cfg.adapter:  # other systems do not read it
                path = Path(cfg.adapter)
                folders = "-".join(path.parts[-3:-1])  # tell runs apart, which all have an adapter.safetensors
                adapters.append(folders if folders and path.stem == "adapter" else path.stem)
        elif key.partition(".")[0].partition("@")[0] not in NOT_IN_LABEL or key.startswith("method."):
            others.append(f"{key.rpartition('.')[2]}{value}")
    return "-".join([hydra.runtime.choices.method, *adapters, *others]).replace("/", "_")


def describe(label: str, scores: dict[str, Any]) -> str:
    lines = [label]
    for name, entry in scores["metrics"].items():
        interval = f"  [{entry['low']:.4f}, {entry['high']:.4f}]" if "low" in entry else ""
        lines.append(f"    {name:20} {entry['value']:.4f}{interval}")
    lines += [f"    {name:20} missing: {reason}" for name, reason in scores["missing"].items()]
    return "\n".join(lines)
