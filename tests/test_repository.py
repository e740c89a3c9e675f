"""The repository as a whole: forbidden contents, dependencies, and whether all configurations compose."""

import ast
import functools
import importlib
import itertools
import re
import subprocess
import tomllib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

import ipa.cli  # noqa: F401  (registers what the configuration interpolates)
from ipa.export.layouts import check_layout
from ipa.types import EncoderWidths

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
COMMANDS = sorted(path.stem for path in CONF.glob("*.yaml"))  # one table of contents for each entry point
MEGABYTE = 10**6

# written in pieces, so that this file does not name them either
REGISTRY_HOSTS = ["pypi." + "org", "python" + "hosted.org", "registry." + "npmjs", "download." + "pytorch"]
INDEX_OPTIONS = ["--index" + "-url", "--extra-index" + "-url", "--find" + "-links"]
KINDS = {"tokens", "kind"}
PAPERS = ["decoupled_fine_grained", "decoupled_global", "simple_fine_grained", "simple_global"]
# groups of which any number is taken, and how one is added
ADDED = {"source": ("train", "recipe=sd15", "+source@data.known.mine"), "metric": ("evaluate", "+metric@metrics.mine")}


@functools.cache
def trainer() -> Any:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def tracked_files() -> list[Path]:
    """Not the user's own in the same folder, which may name what they like."""
    command = ["git", "ls-files", "-z"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return [path for name in result.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def texts() -> dict[str, str]:
    """Relative path → text of every tracked text file."""
    found = {}
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            found[path.relative_to(ROOT).as_posix()] = content.decode("utf-8", errors="replace")
    return found


def test_no_file_names_a_package_registry_or_a_path_of_this_machine() -> None:
    words = [*REGISTRY_HOSTS, *INDEX_OPTIONS, str(ROOT) + "/", str(Path.home()) + "/"]

    assert [(name, word) for name, text in texts().items() for word in words if word in text] == []


def test_requirements_are_names_versions_and_markers_only() -> None:
    requirement = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+( ; [^#/]+)?( +# via .*)?")
    lines = (ROOT / "requirements.txt").read_text().splitlines()

    assert [line for line in lines if not requirement.fullmatch(line)] == []
    assert {"torch", "lightning", "pytest", "resvg-py"} <= {line.partition("==")[0] for line in lines}


def test_demo_world_fits_in_its_allowance() -> None:
    """As git stores it: each content once, compressed."""
    contents = {path.read_bytes() for path in tracked_files() if path.is_relative_to(ROOT / "demo")}

    assert sum(len(zlib.compress(content, 1)) for content in contents) <= 60 * MEGABYTE


def choices(group: str) -> list[str]:
    """Names of the files of a group, nested ones with their folder (``help/train``)."""
    folder = CONF / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def groups() -> list[str]:
    return sorted(
        path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir() and any(path.glob("*.yaml"))
    )


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a composed configuration creates its run folder."""
    monkeypatch.chdir(tmp_path)


def composed(command: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, list(overrides), return_hydra_config=True)


@functools.cache
def training(recipe: str, experiment: str = "decoupled_global") -> DictConfig:
    """Only to be read, since it is composed once."""
    return composed("train", f"recipe={recipe}", f"experiment={experiment}", "name=x")


@functools.cache
def groups_of(command: str) -> set[str]:
    return set(composed(command).hydra.runtime.choices)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_configuration_file_composes(command: str) -> None:
    """With the n-th choice of all groups at once, since their number is large and each compose takes a while."""
    offered = {group: choices(group) for group in groups() if group in groups_of(command)}
    offered = {group: [name for name in names if "/" not in name] for group, names in offered.items()}
    rounds = max(map(len, offered.values())) if command in ("train", "evaluate") else 1
    for n in range(rounds):
        composed(command, *(f"{group}={names[n % len(names)]}" for group, names in offered.items()))


def test_every_group_is_used_by_a_command() -> None:
    used = {group for command in COMMANDS for group in groups_of(command)} | set(ADDED)

    assert [group for group in groups() if group not in used] == []


def test_sources_and_metrics_can_be_added() -> None:
    """All at once, under names of their own."""
    cfgs = {}
    for group, (command, *overrides, added) in ADDED.items():
        cfgs[group] = composed(command, *overrides, *(f"{added}_{choice}={choice}" for choice in choices(group)))
    known = cfgs["source"].data.known

    assert set(known) == {"laion", "coyo", *(f"mine_{choice}" for choice in choices("source"))}
    assert {frozenset(values) for values in known.values()} == {frozenset(known.laion)}


def test_experiments_and_recipes_choose_their_groups_in_every_combination() -> None:
    """By the lists of defaults alone: the files that they name compose, and merging them takes most of the time."""
    owners = [("experiment", name) for name in choices("experiment")], [("recipe", name) for name in choices("recipe")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        parser, repository = OverridesParser.create(loader), CachingConfigRepository(loader.repository)
        for pair in itertools.product(*owners):
            given = parser.parse_overrides([f"{owner}={name}" for owner, name in pair])
            chosen = create_defaults_list(repository, "train", given, prepend_hydra=True, skip_missing=False)
            for owner, name in pair:
                for group, choice in {owner: name, **overridden_groups(owner, name)}.items():
                    found = chosen.overrides.known_choices[group]
                    assert found == choice, f"conf/{owner}/{name}.yaml sets {group}={choice} without effect in {pair}"


@functools.cache
def overridden_groups(owner: str, name: str) -> dict[str, str]:
    """``override /group: choice`` of a file's defaults list, over those of the file that it builds on."""
    content = OmegaConf.to_container(OmegaConf.load(CONF / owner / f"{name}.yaml"), resolve=False)
    found: dict[str, str] = {}
    for entry in content.get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            found |= overridden_groups(owner, entry)
        elif isinstance(entry, dict):
            found |= {key.removeprefix("override /"): choice for key, choice in entry.items()}
    return found


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o in ("experiment", "recipe") for n in choices(o)])
def test_experiments_and_recipes_set_all_groups_that_they_own(owner: str, name: str) -> None:
    """So that the meaning of a file does not depend on the defaults of train.yaml."""
    owned = KINDS if owner == "experiment" else {"base", "encoder", "data", "optimizer", "schedule", "trainer"}
    if owner == "experiment":
        assert set(overridden_groups(owner, name)) <= KINDS
    assert set(overridden_groups(owner, name)) >= owned
    others = {group for each in choices("recipe") for group in overridden_groups("recipe", each)}
    assert owner == "recipe" or not KINDS & others, "no group is set by both"


VIT_H, VIT_BIGG = EncoderWidths(1024, 1280, 257, 224), EncoderWidths(1280, 1664, 257, 224)
# recipe: image encoder, context width, sum of the hidden widths of the cross-attention layers
WORLDS = {
    "sd15": (VIT_H, 768, 12_480),
    "sd21": (VIT_H, 1024, 12_480),
    "sdxl": (VIT_H, 2048, 83_200),
    "sdxl_bigg": (VIT_BIGG, 2048, 83_200),
}
# head and branches; equal to the published files where there are any
PARAMETERS = {
    ("sd15", "decoupled_global"): 22_319_616,
    ("sd15", "decoupled_fine_grained"): 49_087_488,
    ("sd15", "simple_global"): 3_150_336,
    ("sd15", "simple_fine_grained"): 29_918_208,
    ("sdxl", "decoupled_global"): 349_188_096,
    ("sdxl", "decoupled_fine_grained"): 423_748_864,
    ("sdxl_bigg", "decoupled_global"): 351_285_248,
}


@pytest.mark.parametrize(("recipe", "experiment"), [*PARAMETERS, ("sd21", "decoupled_fine_grained")])
def test_heads_and_variants_have_the_published_sizes(recipe: str, experiment: str) -> None:
    (encoder, context, hidden), cfg = WORLDS[recipe], training(recipe, experiment)
    chosen = overridden_groups("experiment", experiment)
    with torch.device("meta"):
        head = instantiate(cfg.tokens)(encoder, context)
    branches = 2 * hidden * context if chosen["kind"] == "decoupled" else 0
    size = sum(parameter.numel() for parameter in head.parameters()) + branches

    assert size == PARAMETERS.get((recipe, experiment), size)
    assert head.no_image == {"global": "zeros", "fine_grained": "blank"}[chosen["tokens"]]
    for layout in (cfg.callbacks.export.layout, *["comfyui"] * bool(branches)):
        check_layout(head, chosen["kind"], layout)


@pytest.mark.parametrize(("recipe", "size_px"), [("sd15", 512), ("sd21", 768), ("sdxl", 512), ("sdxl_bigg", 512)])
def test_large_recipes_are_the_papers(recipe: str, size_px: int) -> None:
    """Ye et al. 2023, section 4.1, except for the image size of 2.1."""
    cfg = training(recipe)

    assert (cfg.global_batch_size, cfg.image_size_px, cfg.trainer.max_steps) == (64, size_px, 1_000_000)
    assert (cfg.optimizer._target_, cfg.optimizer.lr, cfg.optimizer.weight_decay) == ("torch.optim.AdamW", 1e-4, 0.01)
    assert (cfg.schedule.name, cfg.schedule.num_warmup_steps, cfg.scale_lr) == ("constant_with_warmup", 0, None)
    assert [cfg.data.drops[name] for name in ("text", "image", "both")] == [0.05] * 3 and len(cfg.data.drops) == 4
    assert cfg.base.vae_dtype == ("float32" if recipe.startswith("sdxl") else None)
    assert cfg.min_snr_gamma is None and cfg.ema.decay is None and cfg.trainer.accumulate_grad_batches == 1


def private_names() -> tuple[set[tuple[str, str]], set[str]]:
    """What `ipa` uses of other packages by a private name: imports (module, name), and attributes."""
    imported, attributes = set(), set()
    for path in (ROOT / "ipa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("ipa"):
                imported |= {(node.module, alias.name) for alias in node.names if "._" in f"{node.module}.{alias.name}"}
            elif isinstance(node, ast.Import):
                imported |= {(alias.name, "") for alias in node.names if "._" in alias.name}
            elif isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                attributes |= set() if own else {node.attr}
    return imported, attributes - PUBLIC


PUBLIC = {"_replace", "_fields", "_asdict", "_target_", "_exit", "_dynamo"}  # documented, or an imported module
PRIVATE_ATTRIBUTES: dict[str, Callable[[], Any]] = {
    "_foreach_add_": lambda: torch,
    "_foreach_mul_": lambda: torch,
    "_foreach_norm": lambda: torch,
    "_foreach_sub": lambda: torch,
    "_step_supports_amp_scaling": lambda: torch.optim.AdamW([torch.zeros(1)], fused=True),
    "_set_params_and_buffers_to_ignore_for_model": lambda: torch.nn.parallel.DistributedDataParallel,
    "_logger_connector": trainer,
    "_signal_connector": trainer,
    "_broadcast_sigterm_tensor": lambda: trainer().fit_loop.epoch_loop,
    "_wandb_init": lambda: WandbLogger(offline=True),
    "_configure_launcher": lambda: L.pytorch.strategies.DDPStrategy,
    "_setup_model": lambda: L.pytorch.strategies.DDPStrategy,
    "_lazy_init": lambda: importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_state").FSDPState,
    "_on_queue_feeder_error": lambda: importlib.import_module("multiprocessing.queues").Queue,
    "_encode_image_prompt": lambda: diffusers.VersatileDiffusionDualGuidedPipeline,
}
BOUNDED = {"diffusers", "hydra-core", "lightning", "torch"}  # packages of which private names are used


def test_private_names_of_libraries_are_there() -> None:
    """They may go with any release, so their packages have upper bounds."""
    imported, attributes = private_names()

    assert ("hydra._internal.utils", "get_args_parser") in imported  # the search works
    for module, name in imported:
        assert not name or hasattr(importlib.import_module(module), name), f"{module}.{name}"
    assert attributes <= PRIVATE_ATTRIBUTES.keys()
    for name in attributes:
        assert hasattr(PRIVATE_ATTRIBUTES[name](), name), name
    packages = {module.partition(".")[0].replace("hydra", "hydra-core") for module, _ in imported}
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounded = {re.split("[<>=]", each)[0] for each in dependencies if "<" in each}
    assert packages <= BOUNDED <= bounded
