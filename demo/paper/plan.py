"""What is trained, and how: each job is a list of commands that resume, in a folder named after all that they read.

A job whose settings or inputs changed has another folder, so finished work is never mistaken for other work.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demo.paper import ROOT
from ipa.errors import UserError
from ipa.files import hash_file, pictures_in, read_json
from ipa.overrides import quote_value
from ipa.ranges import FLAG, TRAINING_STEPS, number, whole

BATCH = 16
PLAIN = re.compile(r"[\w./-]+")
BASE, JUDGE, ENCODER, TRAIN, HELDOUT, UNSEEN = (
    f"demo/{name}" for name in ("base", "judge", "encoder", "data/train", "data/heldout", "data/unseen")
)
CONTROLS = {"controlnet": "demo/control", "t2i_adapter": "demo/t2i_adapter"}  # on edges
RECIPE = "conf/recipe/demo.yaml"
PAGE = "docs/paper"
# custom bases: demo/base fine-tuned on one drawing style
STYLES = ("noto", "fluent", "twemoji")
POINTS = 6  # checkpoints of a training, of which this one keeps all:
CURVE = "global"
# rough seconds of one thread, for the time that is left
SAMPLE_S, SYSTEM_SAMPLE_S, DENOISING_S, START_S = 0.02, 0.035, 0.008, 12.0

FEW = "+data.filters.few.key=json.key"
NUMBERS = (100, 300)  # of training images; the first of the first shard
NEW_LR = 3e-3  # of new layers
ADAMW = ("optimizer=adamw", f"optimizer.lr={NEW_LR:g}")  # for section 9: the optimizer of the compared systems


def few(count: int) -> tuple[str, ...]:
    return ("data.train=demo/data/train/00000.tar", FEW, f"+data.filters.few.max={count - 1}")


def drops(text: float, image: float, both: float) -> tuple[str, ...]:
    return (f"data.drops.text={text}", f"data.drops.image={image}", f"data.drops.both={both}")


def adapters() -> dict[str, tuple[str, ...]]:
    """Name → options of train.py."""
    decoupled, fine = "experiment=decoupled_global", "experiment=decoupled_fine_grained"
    return {
        "global": (decoupled,),
        "fine": (fine,),
        "simple": ("experiment=simple_global",),
        "simple_fine": ("experiment=simple_fine_grained",),
        "simple_wide": ("experiment=simple_global", f"tokens.num_tokens={wide_tokens()}"),
        **{f"global_{count}": (decoupled, *few(count)) for count in NUMBERS},
        **{f"fine_{count}": (fine, *few(count)) for count in NUMBERS},
        "drops_none": (decoupled, *drops(0, 0, 0)),
        "drops_text": (decoupled, *drops(0.4, 0, 0)),
        "drops_image": (decoupled, *drops(0, 0.05, 0)),
        "style_pairs": (decoupled, "data.pairs.by=style"),
        "concept_pairs": (
            *(decoupled, "data.pairs.by=concept", "data.pairs.differ=style"),
            "data.reference_background=${data.background}",
        ),
        "global_adamw": (decoupled, *ADAMW),
        "fine_adamw": (fine, *ADAMW),
    }


@functools.cache
def wide_tokens() -> int:
    """Tokens of a simple adapter that trains as many parameters as the decoupled one with four tokens."""
    from ipa.encoders import read_widths
    from ipa.families.stable_diffusion import StableDiffusion

    base, encoder = StableDiffusion.read_widths(BASE), read_widths(f"local-dir:{ENCODER}")
    of_token = (encoder.pooled + 1) * base.context
    return round((4 * of_token + 2 * base.context * sum(base.hosts)) / of_token)


@dataclass(frozen=True)
class Settings:
    """The options of the command, with ``full`` or ``small`` filled in."""

    steps: int
    seeds: tuple[int, ...]
    items: int
    num_steps: int
    base_minutes: float
    guidance: float
    shown: int
    jobs: int
    quick: bool
    own: str | None
    work: Path
    out: Path

    @classmethod
    def of(cls, cfg: Any) -> Settings:
        """Raises UserError for a value out of range."""
        quick = read("quick", cfg.quick, FLAG)
        chosen = cfg.small if quick else cfg.full
        given = {name: default if cfg[name] is None else cfg[name] for name, default in chosen.items()}
        ranges = {
            "steps": whole(1),
            "items": whole(1, number_of_images(HELDOUT)),
            "num_steps": whole(1, TRAINING_STEPS),
        }
        ranges["base_minutes"] = number(above=0)
        given |= {name: read(name, given[name], known) for name, known in ranges.items()}
        given["seeds"] = read_list("seeds", given["seeds"], whole(0, 999))
        shared = {name: read(name, cfg[name], whole(1)) for name in ("shown", "jobs")}
        guidance = read("guidance", cfg.guidance, number(1, 1000))
        own = None if cfg.own is None else str(cfg.own)
        if own is not None:
            pictures_in(own, "own")
        is_whole = not quick and cfg.sections is None and own is None
        work = folder("work", cfg.work)
        out = folder("out", cfg.out) if cfg.out is not None else Path(PAGE) if is_whole else work / "page"
        return cls(**given, **shared, work=work, out=out, guidance=guidance, quick=quick, own=own)

    def described(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def read(name: str, value: Any, known: Any) -> Any:
    try:
        return known.read(value)
    except ValueError:
        raise UserError(f"{name}={value}: give {known}") from None


def read_list(name: str, values: Any, known: Any) -> tuple[int, ...]:
    """Of one number or a list of different ones."""
    listed = [values] if isinstance(values, int | float | str) else list(values)
    try:
        found = tuple(known.read(value) for value in listed)
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found):
        raise UserError(f"{name}={values}: give {known}, or a list of different ones such as [1,2,3]")
    return found


def folder(name: str, given: Any) -> Path:
    """One that is there or can be made."""
    path = Path(str(given))
    is_name = isinstance(given, str | int) and not isinstance(given, bool)
    if not is_name or not next(each for each in (path, *path.parents) if each.exists()).is_dir():
        raise UserError(f"{name}={'null' if given is None else given} is no folder: give one, which may be new")
    return path


def number_of_images(folder: str) -> int:
    return sum(read_json(path)["successes"] for path in Path(folder).glob("*_stats.json"))


@dataclass(frozen=True)
class Job:
    """Commands to run one after the other. ``result`` is there when they have ended; ``seconds`` is an estimate."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    folder: Path
    result: Path
    seconds: float
    progress: Callable[[], float] = lambda: 0.0  # the share that is done

    def is_done(self) -> bool:
        return self.result.exists()

    def shown(self) -> list[str]:
        """As one types them."""
        return [shlex.join(command) for command in self.commands]


@functools.cache
def hash_of(*paths: str) -> str:
    """Of files, and of all files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        root = Path(path)
        for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if file.is_file():
                digest.update(f"{file.relative_to(root)} {hash_file(file)} ".encode())
    return digest.hexdigest()


def short_hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]


def train_adapter(name: str, seed: int, settings: Settings) -> Job:
    every = max(1, settings.steps // POINTS)
    options = (
        *adapters()[name],
        f"seed={seed}",
        f"trainer.max_steps={settings.steps}",
        f"schedule.num_warmup_steps={settings.steps // 20}",
        f"preview.every_n_steps={every}",
        f"checkpoint.keep_last={POINTS + 1 if name == CURVE else 1}",
        "preview.num_prompts=0",
        "preview.num_scored=0",
        "judge=null",
        "scoring=null",
        "~logger.wandb",
    )
    key = short_hash(options, hash_of(BASE, ENCODER, TRAIN, RECIPE))
    folder = settings.work / "trainings" / f"{name}-{seed}-{key}"
    seconds = START_S + settings.steps * BATCH * SAMPLE_S

    def progress() -> float:
        try:
            last = (folder / "log.csv").read_text().splitlines()[-1]
            return min(1.0, int(last.split(",")[0]) / settings.steps)
        except (OSError, ValueError, IndexError):
            return 0.0

    command = ("python", "train.py", *options, f"hydra.run.dir={quoted(folder)}")
    return Job(f"{name}, seed {seed}", (command,), folder, folder / "summary.json", seconds, progress)


def quoted(path: Path) -> str:
    """For Hydra, if it needs that."""
    return str(path) if PLAIN.fullmatch(str(path)) else quote_value(str(path))


def train_system(name: str, settings: Settings) -> Job:
    """One of the systems of section 9, with the first seed: the samples of the adapters of this seed."""
    options = (f"steps={settings.steps}", f"seed={settings.seeds[0]}")
    key = short_hash(name, options, hash_of(BASE, "demo/image_encoder", TRAIN, RECIPE))
    folder = settings.work / "systems" / f"{name}-{key}"
    command = ("python", "-m", "demo.paper.train_system", name, *options, f"out={folder}")
    seconds = START_S + settings.steps * BATCH * SYSTEM_SAMPLE_S

    def progress() -> float:
        try:
            return read_json(folder / "progress.json")["step"] / settings.steps
        except (OSError, UserError, LookupError):
            return 0.0

    return Job(name, (command,), folder, folder / "system.safetensors", seconds, progress)


def train_base(style: str, settings: Settings) -> Job:
    """demo/base fine-tuned on one drawing style, a custom base that no adapter sees in training."""
    folder = settings.work / "bases" / f"{style}-{short_hash(settings.base_minutes, hash_of(BASE, TRAIN))}"
    shared = ("--start", BASE, "--build", str(folder))
    training = ("--style", style, "--minutes", f"{settings.base_minutes:g}", "--lr", "6e-4")
    quickly = ("--warmup", "50", "--horizon", "100")
    commands = (
        ("python", "demo/make_base.py", "unet", *shared, *training, *quickly),
        ("python", "demo/make_base.py", "export", *shared, "--out", f"{folder}/base"),
    )
    seconds = 2 * START_S + 60 * settings.base_minutes
    return Job(f"custom base {style}", commands, folder, folder / "base", seconds)


def executable(command: Sequence[str]) -> list[str]:
    return [sys.executable if word == "python" else word for word in command]


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def as_data(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it is after writing and reading JSON."""
    return json.loads(json.dumps(value, default=str))
