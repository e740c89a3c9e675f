"""The commands, options and examples in README and docs, found and checked without running them.

A command is a line of a fenced ``bash`` block or of an indented block that begins with a program. How much of it can be
tried is read from the page: ``<!-- commands: run -->`` above a block lets it run in tests/test_documented_commands.py;
``<!-- commands: gpu, hub, hours -->`` names what it needs that tests do not have, as do the words "GPU", "hub" and
"hours" in the comment behind a command. All are composed or parsed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import composing
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf, open_dict

from ipa.cli import CONF
from ipa.launcher import ProcessLauncher, register
from ipa.overrides import complaints_about
from ipa.prompter import Prompter
from ipa.ranges import check
from ipa.references import Item, Reference
from ipa.slurm import SlurmLauncher
from ipa.tools.options import read_options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *("README.md", "demo/README.md", "demo/card/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]
RUN, NEEDS = "run", {"gpu", "hub", "hours", "cluster", "install", "browser"}  # the marks
FENCE = re.compile(r"```(\w*)")
MARK = re.compile(r"<!-- commands: ([\w, ]+) -->")
HYDRA = {
    "train.py": "train",
    "evaluate.py": "evaluate",
    "ipa.tools.train": "train",
    "ipa.tools.evaluate": "evaluate",
    "ipa.tools.inspect": "inspect",
    "ipa.tools.pair": "pair",
    "demo.paper": "paper",
    "ipa.tools.precompute": "precompute",
}
POSITIONAL = {"ipa.tools.pack": ("folder", "out"), "ipa.tools.report": ("folder",)}
LAUNCHERS = {"torchrun", "sbatch", "srun"}
FOREIGN = {"img2dataset", "curl", "scontrol", "dmesg", "kill", "hf", "tar", "wandb", "salloc"}
SHELL = {"source", "export", "cd", "git", "pip", "uv"}
PROGRAMS = {"python", "make", *LAUNCHERS, *FOREIGN, *SHELL}

register({}, ProcessLauncher, SlurmLauncher)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str  # bash, python, yaml, or empty
    text: str
    marks: frozenset[str]


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    words: tuple[str, ...]
    marks: frozenset[str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def blocks(page: str) -> Iterator[Block]:
    """Fenced blocks with their language, and indented blocks that begin with a program or an import."""
    marks: frozenset[str] = frozenset()
    lines = (ROOT / page).read_text().splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        start = number + 1
        if mark := MARK.fullmatch(line.strip()):
            marks = frozenset(re.split(r"[, ]+", mark[1]))
        elif fence := FENCE.match(line):
            end = next(i for i in range(start, len(lines)) if lines[i].startswith("```"))
            yield Block(page, start + 1, fence[1], "\n".join(lines[start:end]), marks)
            number, marks = end, frozenset()
        elif line.startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = next(
                (i for i in range(start, len(lines)) if not lines[i].startswith("    ") and lines[i]), len(lines)
            )
            text = "\n".join(each[4:] for each in lines[number:end]).rstrip()
            yield Block(page, start, language_of(text), text, marks)
            number, marks = end - 1, frozenset()
        elif line.strip():
            marks = frozenset()
        number += 1


def language_of(text: str) -> str:
    first = text.split(maxsplit=1)[0]
    if first in PROGRAMS or first.startswith("ipa-"):
        return "bash"
    try:
        ast.parse(text)
    except SyntaxError:
        return ""
    return "python" if re.search(r"^(import|from) |^[\w.\[\]:, ]+ = ", text, re.MULTILINE) else ""


def commands(page: str) -> Iterator[Command]:
    for block in blocks(page):
        if block.language == "bash":
            yield from commands_of(block)


def commands_of(block: Block) -> Iterator[Command]:
    lines, first, pending = block.text.splitlines(), block.line, ""
    for number, line in enumerate(lines, block.line):
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        comment = re.search(r"(?:^|\s)# (.*)", pending)
        words = shlex.split(pending, comments=True)
        needs = {need for need in ("gpu", "hub", "hours") if comment and re.search(rf"\b{need}", comment[1].lower())}
        needs |= {"browser"} if "ipa.tools.app" in words else set()  # it serves until it is stopped
        if words:
            runs = not needs and (words[0] == "python" or words[0].startswith("ipa-"))
            marks = (block.marks if runs else block.marks - {RUN}) | needs
            yield Command(block.page, first, tuple(words), frozenset(marks))
        first, pending = number + 1, ""


def mentions(page: str) -> Iterator[str]:
    """What is set in code type within the text."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    yield from (" ".join(each.split()) for each in re.findall(r"`([^`]+)`", text))


def complaint(words: tuple[str, ...]) -> str | None:
    """What is wrong with a command; None if it would start."""
    words = tuple(word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word) or word.startswith("ARGS="))
    program, *rest = as_python(words)
    if program in LAUNCHERS:
        return complaint_of_launcher(rest)
    if program == "make":
        return complaint_of_make(rest)
    if program == "pip":
        return complaint_of_pip(rest)
    if program in FOREIGN | SHELL:
        return None
    if program not in ("python", ".venv/bin/python"):
        return f"{program} is none of {', '.join(sorted(PROGRAMS))}"
    script, arguments = (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
    if script in HYDRA:
        return complaint_of_hydra(HYDRA[script], tuple(arguments))
    if script.startswith("ipa.tools."):
        return complaint_of_tool(script, arguments)
    return complaint_of_script(script, arguments)


def as_python(words: tuple[str, ...]) -> tuple[str, ...]:
    """``ipa-sample`` is ``python -m ipa.tools.sample``."""
    return ("python", "-m", scripts()[words[0]], *words[1:]) if words[0].startswith("ipa-") else words


def complaint_of_launcher(words: list[str]) -> str | None:
    """``torchrun … train.py …``, ``sbatch … SCRIPT …``: the file, and the options behind it."""
    names = [word for word in words if word.endswith((".py", ".sbatch"))]
    if not names:
        return None
    name, rest = names[0], words[words.index(names[0]) + 1 :]
    if name.endswith(".sbatch"):
        return complaint_of_hydra("train", tuple(rest)) if (ROOT / name).is_file() else f"{name} does not exist"
    return complaint(("python", name, *rest))


def complaint_of_make(words: list[str]) -> str | None:
    """The target, and the commands of it with ARGS."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = [word for word in words if "=" not in word and word not in targets]
    if unknown:
        return f"no target {unknown[0]} in the Makefile"
    options = [word.partition("=")[2] for word in words if word.startswith("ARGS=")]
    return complaint(("python", "train.py", *shlex.split(options[0]))) if options and "train" in words else None


def complaint_of_pip(words: list[str]) -> str | None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [name for word in words for name in ",".join(re.findall(r"^\.\[(.*)\]$", word)).split(",") if name]
    return next((f"no extra {name} in pyproject.toml" for name in asked if name not in extras), None)


@cache
def scripts() -> dict[str, str]:
    """The console scripts with their modules."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    return {name: module.partition(":")[0].removesuffix(".__main__") for name, module in found.items()}


@cache
def complaint_of_hydra(config: str, arguments: tuple[str, ...]) -> str | None:
    """Composed, and the values checked; of a sweep the first job."""
    given = [word for word in arguments if not is_placeholder(word)]
    args = get_args_parser().parse_args(given)
    own = (f"hydra.searchpath=[file://{args.config_dir}]",) if args.config_dir else ()
    try:
        check(composed(config, (*own, *args.overrides)))
    except Exception as error:  # whatever a command raises for a wrong option
        return "\n".join(complaints_about(given, str(CONF), config)) or f"{type(error).__name__}: {error}"
    return None


def composed(config: str, overrides: tuple[str, ...]) -> DictConfig:
    cfg = composing.composed(config, *overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def complaint_of_tool(module: str, arguments: list[str]) -> str | None:
    tool = importlib.import_module(f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module)
    given = [word for word in arguments if not is_placeholder(word)]
    if {"--help", "-h"} & set(given):
        return None
    try:
        read_options(given, tool.Options, POSITIONAL.get(module, ()))
    except ValueError as error:
        incomplete = len(given) < len(arguments) and str(error).startswith("please give")
        return None if incomplete else str(error)
    return None


def complaint_of_script(script: str, arguments: list[str]) -> str | None:
    """A script with argparse: its file, and the names of its options and subcommands."""
    if not (ROOT / script).is_file():
        return f"{script} does not exist"
    source = (ROOT / script).read_text()
    known = set(re.findall(r"\"(--?[a-z][\w-]*)\"", source)) | {"--help"}
    return next((f"{script} has no {word}" for word in arguments if word.startswith("--") and word not in known), None)


def is_placeholder(word: str) -> bool:
    return "…" in word


def complaint_of_python(block: Block) -> str | None:
    """Whether an example parses, and its imports are there."""
    try:
        tree = ast.parse(block.text.replace("…", "..."))
    except SyntaxError as error:
        return str(error)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ("ipa", "diffusers"):
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            if missing:
                return f"{node.module} has no {missing[0]}"
    return None


def makes(target: str) -> list[tuple[str, ...]]:
    """The commands of a target of the Makefile."""
    printed = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = printed.replace("\\\n", " ").splitlines()
    ours = re.compile(r"\.venv/bin/python (train\.py|evaluate\.py|-m ipa\.)")
    return [("python", *shlex.split(line)[1:]) for line in lines if ours.match(line.strip())]


@cache
def options() -> set[str]:
    """Dotted names of all options: of the commands, the tools, and the Python interface."""
    worlds = [
        ("train", ()),
        ("train", ("recipe=sd15", "encoder=clip_vision")),
        ("train", ("recipe=sd15", "data=cache", "hydra/launcher=submitit_slurm")),
        ("evaluate", ("method=ip_adapter_control", "benchmark=coco2017")),
        ("evaluate", ("benchmark=folder",)),
        ("inspect", ()),
        ("pair", ()),
        ("paper", ()),
        ("train", ("recipe=flux", "kind=decoupled")),
        ("train", ("recipe=sd35_medium",)),
        ("precompute", ()),
    ]
    found = {path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()}
    for config, choices in worlds:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            found |= set(names_in(OmegaConf.to_container(composing.chosen(config, choices), resolve=False)))
    for module in {each for each in scripts().values() if each not in HYDRA}:
        tool = importlib.import_module(f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module)
        found |= {each.name for each in fields(tool.Options)}
    for call in (Prompter.load, Prompter.__call__, Reference, Item):
        found |= set(inspect.signature(call).parameters)
    return found


def names_in(node: object, path: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            name = f"{path}.{key}".lstrip(".")
            yield name
            yield from names_in(value, name)
