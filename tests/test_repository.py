"""The repository as a whole: what may stand in its files, and that its configuration fits together."""

import functools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import ipa.cli  # noqa: F401  (registers what the configuration interpolates)
from ipa.export.layouts import check_layout
from ipa.training.parts import read_widths
from ipa.types import EncoderWidths

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
COMMANDS = sorted(path.stem for path in CONF.glob("*.yaml"))  # one table of contents for each entry point
MEGABYTE = 10**6

# written in pieces, so that this file does not name them either
REGISTRY_HOSTS = ["pypi." + "org", "python" + "hosted.org", "registry." + "npmjs", "download." + "pytorch"]
INDEX_OPTIONS = ["--index" + "-url", "--extra-index" + "-url", "--find" + "-links"]
KINDS = {"tokens", "kind"}
# groups of which any number is taken, and how one is added
ADDED = {"source": ("train", "recipe=sd15", "+source@data.known.mine"), "metric": ("evaluate", "+metric@metrics.mine")}


def tracked_files() -> list[Path]:
    """Files that are in git or on the way into it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
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


@pytest.mark.parametrize("words", [REGISTRY_HOSTS, INDEX_OPTIONS], ids=["hosts", "options"])
def test_no_file_names_a_package_registry(words: list[str]) -> None:
    assert [(name, word) for name, text in texts().items() for word in words if word in text] == []


def test_no_file_holds_a_path_of_the_machine_it_was_written_on() -> None:
    places = [str(ROOT) + "/", str(Path.home()) + "/"]

    assert [(name, place) for name, text in texts().items() for place in places if place in text] == []


def test_requirements_are_names_versions_and_markers_only() -> None:
    requirement = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+( ; [^#/]+)?( +# via .*)?")
    lines = (ROOT / "requirements.txt").read_text().splitlines()

    assert [line for line in lines if not requirement.fullmatch(line)] == []
    assert {"torch", "lightning", "pytest", "resvg-py"} <= {line.partition("==")[0] for line in lines}


def test_make_help_lists_the_everyday_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))

    assert {"help", "venv", "train", "test", "test-slow", "lint", "format", "type", "demo-world", "clean"} <= targets


def test_demo_world_fits_in_its_allowance() -> None:
    size = sum(path.stat().st_size for path in tracked_files() if path.is_relative_to(ROOT / "demo"))

    assert size <= 35 * MEGABYTE


def choices(group: str) -> list[str]:
    """Names of the files of a group, nested ones with their folder (``help/train``)."""
    folder = CONF / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def groups() -> list[str]:
    return sorted(
        path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir() and any(path.glob("*.yaml"))
    )


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


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group in groups() for choice in choices(group) if "/" not in choice]
)
def test_every_configuration_file_composes(group: str, choice: str) -> None:
    if group in ADDED:
        composed(*ADDED[group][:-1], f"{ADDED[group][-1]}={choice}")
        return
    commands = [command for command in COMMANDS if group in groups_of(command)]
    assert commands, f"no command uses conf/{group}"

    for command in commands:
        composed(command, f"{group}={choice}")


@pytest.mark.parametrize("choice", choices("source"))
def test_every_source_can_be_added(choice: str) -> None:
    cfg = composed("train", "recipe=sd15", f"+source@data.known.mine={choice}")

    assert set(cfg.data.known) == {"laion", "coyo", "mine"}
    assert set(cfg.data.known.mine) == set(cfg.data.known.laion)


@pytest.mark.parametrize("experiment", choices("experiment"))
@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_experiment_composes_in_every_recipe(experiment: str, recipe: str) -> None:
    cfg = training(recipe, experiment)

    chosen = cfg.hydra.runtime.choices
    assert (chosen.experiment, chosen.recipe) == (experiment, recipe)
    for owner, name in (("experiment", experiment), ("recipe", recipe)):
        for group, choice in overridden_groups(owner, name).items():
            assert chosen[group] == choice, f"conf/{owner}/{name}.yaml asks for {group}={choice} and is not heard"


def overridden_groups(owner: str, name: str) -> dict[str, str]:
    """What a file's defaults list says with ``override /group: choice``."""
    content = OmegaConf.to_container(OmegaConf.load(CONF / owner / f"{name}.yaml"), resolve=False)
    entries = [entry for entry in content.get("defaults", []) if isinstance(entry, dict)]
    return {
        key.removeprefix("override /"): choice
        for entry in entries
        for key, choice in entry.items()
        if key.startswith("override /")
    }


def test_no_group_is_set_by_both_experiment_and_recipe() -> None:
    by_experiments = {group for name in choices("experiment") for group in overridden_groups("experiment", name)}
    by_recipes = {group for name in choices("recipe") for group in overridden_groups("recipe", name)}

    assert by_experiments <= KINDS
    assert not by_experiments & by_recipes


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o in ("experiment", "recipe") for n in choices(o)])
def test_experiments_and_recipes_say_everything_that_they_own(owner: str, name: str) -> None:
    """So that what a file means does not depend on the defaults of train.yaml."""
    owned = KINDS if owner == "experiment" else {"base", "encoder", "data", "optimizer", "schedule", "trainer"}

    assert set(overridden_groups(owner, name)) >= owned


VIT_H, VIT_BIGG = EncoderWidths(1024, 1280, 257, 224), EncoderWidths(1280, 1664, 257, 224)
# recipe: image encoder, context width, hidden widths of the cross-attention layers added up
WORLDS = {
    "sd15": (VIT_H, 768, 12_480),
    "sd21": (VIT_H, 1024, 12_480),
    "sdxl": (VIT_H, 2048, 83_200),
    "sdxl_bigg": (VIT_BIGG, 2048, 83_200),
}
# head and branches; those that were published have the published files' count
PARAMETERS = {
    ("sd15", "decoupled_global"): 22_319_616,
    ("sd15", "decoupled_fine_grained"): 49_087_488,
    ("sd15", "simple_global"): 3_150_336,
    ("sd15", "simple_fine_grained"): 29_918_208,
    ("sdxl", "decoupled_global"): 349_188_096,
    ("sdxl", "decoupled_fine_grained"): 423_748_864,
    ("sdxl_bigg", "decoupled_global"): 351_285_248,
}


def fitted_head(cfg: DictConfig, recipe: str) -> Any:
    """The head of a configuration in the recipe's world, without memory."""
    encoder, context, _ = WORLDS[recipe]
    with torch.device("meta"):
        return instantiate(cfg.tokens)(encoder, context)


@pytest.mark.parametrize("recipe", WORLDS)
def test_encoders_of_the_recipes_are_as_wide_as_published(recipe: str) -> None:
    """From the configuration files that open_clip brings along; the context widths are the bases' own."""
    assert read_widths(training(recipe).encoder) == WORLDS[recipe][0]


@pytest.mark.parametrize(("recipe", "experiment"), PARAMETERS, ids="-".join)
def test_variants_are_as_large_as_published(recipe: str, experiment: str) -> None:
    cfg = training(recipe, experiment)
    _, context, hidden = WORLDS[recipe]
    branches = 2 * hidden * context if cfg.adapter.make._target_.endswith("DecoupledAdapter") else 0

    assert sum(p.numel() for p in fitted_head(cfg, recipe).parameters()) + branches == PARAMETERS[recipe, experiment]


@pytest.mark.parametrize("recipe", WORLDS)
@pytest.mark.parametrize("experiment", choices("experiment"))
def test_heads_have_the_published_sizes(recipe: str, experiment: str) -> None:
    cfg = training(recipe, experiment)
    head = fitted_head(cfg, recipe)
    kind, _, name = experiment.partition("_")

    assert (head.context_width, head.num_tokens) == (WORLDS[recipe][1], {"global": 4, "fine_grained": 16}[name])
    assert head.no_image == {"global": "zeros", "fine_grained": "blank"}[name]
    check_layout(head, kind, cfg.callbacks.export.layout)
    if name == "fine_grained":
        width, heads = (1280, 20) if recipe.startswith("sdxl") else (head.context_width, 12)
        assert (head.width, head.heads, head.head_width, head.depth, head.expansion) == (width, heads, 64, 4, 4)
        if kind == "decoupled":
            check_layout(head, kind, "comfyui")


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_heads_of_the_demo_world_can_be_written_for_diffusers(experiment: str) -> None:
    cfg = training("demo", experiment)
    with torch.device("meta"):
        head = instantiate(cfg.tokens)(EncoderWidths(192, 192, 65, 64), 128)

    check_layout(head, experiment.partition("_")[0], cfg.adapter.layout)
    assert cfg.adapter.layout == ("diffusers" if experiment.startswith("decoupled") else "ipa")


@pytest.mark.parametrize(("recipe", "size_px"), [("sd15", 512), ("sd21", 768), ("sdxl", 512), ("sdxl_bigg", 512)])
def test_large_recipes_are_the_papers(recipe: str, size_px: int) -> None:
    """Ye et al. 2023, section 4.1, but for the picture size of 2.1."""
    cfg = training(recipe)

    assert (cfg.global_batch_size, cfg.data.batch_size, cfg.image_size_px) == (64, None, size_px)
    assert cfg.trainer.max_steps == cfg.schedule.num_training_steps == 1_000_000
    assert cfg.optimizer == {
        "_target_": "torch.optim.AdamW",
        "_partial_": True,
        "lr": 1e-4,
        "weight_decay": 0.01,
        "fused": True,  # the same step, in one kernel
    }
    assert (cfg.schedule.name, cfg.schedule.num_warmup_steps, cfg.scale_lr) == ("constant_with_warmup", 0, None)
    assert {name: rate for name, rate in cfg.data.drops.items() if name != "_target_"} == {
        "text": 0.05,
        "image": 0.05,
        "both": 0.05,
    }
    assert cfg.trainer.precision == "bf16-mixed"
    assert cfg.base.dtype == cfg.encoder.dtype == "bfloat16"
    assert cfg.base.vae_dtype == ("float32" if recipe.startswith("sdxl") else None)
    assert cfg.min_snr_gamma is None and cfg.ema.decay is None and cfg.trainer.accumulate_grad_batches == 1


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch):
    """Composes as Hydra does for a job and reads the folder from it."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def read(key: str, *overrides: str) -> str:
        cfg = composed("train", *overrides)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        HydraConfig.instance().set_config(cfg)
        return OmegaConf.select(cfg, key)

    return read


def test_run_folder_is_named_after_experiment_and_run(folder) -> None:
    assert folder("hydra.run.dir", "name=mine") == "runs/decoupled_global/mine"
    assert folder("hydra.run.dir", "name=mine", "paths.runs=/scratch") == "/scratch/decoupled_global/mine"
    assert folder("hydra.sweep.dir", "name=mine") == "runs/mine"
    assert re.fullmatch(r"runs/decoupled_global/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder("hydra.run.dir"))


def test_slurm_job_that_is_queued_again_finds_its_run_folder(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")

    assert folder("hydra.run.dir") == "runs/decoupled_global/4711"
    assert folder("hydra.run.dir", "name=mine") == "runs/decoupled_global/mine"
