"""The configuration of a run: saved when it begins, and what wins when it goes on.

A run's folder may come from somebody else, and what a configuration names in ``_target_`` is called. So a saved one is
read as data: only what this checkout's own configurations or the command line name is called, the environment is read
and programs are run only where the command line says so itself, and nothing is written outside the run's folder.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ipa.errors import UserError, brief
from ipa.files import write_atomically
from ipa.secrets import hide, unresolved_where_secret, without_secrets

log = logging.getLogger(__name__)

# how far to go and how to get there, which a run that goes on may be asked anew
MAY_CHANGE = (
    "trainer.max_steps",
    "schedule.num_training_steps",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accumulate_grad_batches",
    "data.num_workers",
    "gradient_checkpointing",
    "compile",
    "profile",
    "checkpoint.keep_last",
    "callbacks.checkpoints.keep_last",
    "resume",
    "stop",
    "guard",
    "callbacks.finite_guard",
    "callbacks.stalls",
    "logger",
    "paths",
    "group",
)
# what a run that goes on takes from the command line alone, even if that says nothing of it
AS_ASKED = ("data.schemes",)
TARGET = re.compile(r"_target_:\s*[\"']?([\w.]+)")
MOST_BYTES, MOST_DEPTH = 1 << 20, 40
WRITERS = ("callbacks", "trainer", "logger")  # whose files lie in the run's folder
WORD_OR_NUMBER = ("trainer.precision", "trainer.devices", "name")
PLACE = re.compile(r"[._](folder|path|dir|dirpath|file|filename|out)$")


def settle_configuration(cfg: DictConfig, folder: Path, goes_on: bool) -> DictConfig:
    """Save the resolved configuration; for a run that goes on the saved one wins, and the differences are told.

    What is in ``MAY_CHANGE`` changes nothing of the steps already made and is taken as asked. A secret is saved as the
    expression that it came from. Raises UserError for a saved configuration that is none, or asks for what only the
    command line may.
    """
    written: Any = OmegaConf.to_container(cfg)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    asked = unresolved_where_secret(resolved, written)
    path = folder / "config.yaml"
    if not goes_on:
        save(path, asked)
        return resolve(asked, path)
    log.info("%s has a checkpoint: this run goes on from there with its saved configuration", folder)
    saved = as_of_old(read_configuration(path, written), asked, path)
    check_places(saved, asked, path)
    check_numbers(saved, asked, path)
    settled = resolve(saved, path)
    for name, (before, now) in differences(settled, resolve(asked, path)).items():
        log.warning("%s stays %s; you asked for %s, which needs a run of its own (another name=)", name, before, now)
    save(path, saved)
    return settled


def as_of_old(saved: dict[str, Any], asked: dict[str, Any], path: Path) -> dict[str, Any]:
    """The saved configuration in its new place, with what may change as asked."""
    missing = [name for name in asked if name not in saved and name not in MAY_CHANGE]
    if missing or not isinstance(saved.get("paths"), dict) or not isinstance(saved["paths"].get("run"), str):
        raise UserError(f"{path} is no whole configuration of a run: it lacks {', '.join(missing) or 'paths.run'}")
    wanted: Any = OmegaConf.create(asked)
    found: Any = OmegaConf.create(moved(saved, saved["paths"]["run"], asked["paths"]["run"]))
    for name in MAY_CHANGE:
        if (value := at(asked, name)) is not None:  # there may be no schedule
            OmegaConf.update(found, name, value, merge=False)
    for name in AS_ASKED:
        take(found, wanted, name)
    container: Any = OmegaConf.to_container(found)
    return container


def at(node: Any, name: str) -> Any:
    """What stands under a dotted name, not resolved; None for nothing."""
    for key in name.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def take(found: Any, wanted: Any, name: str) -> None:
    """Make ``found`` say of this option what ``wanted`` says, if only by its absence."""
    group, _, key = name.rpartition(".")
    place = OmegaConf.select(found, group)
    if isinstance(place, DictConfig):
        place.pop(key, None)
    if OmegaConf.select(wanted, name) is not None:
        OmegaConf.update(found, name, OmegaConf.select(wanted, name), merge=False)


@rank_zero_only
def save(path: Path, content: Mapping[str, Any]) -> None:
    """By the first process: those of several machines may have one number, and would write beside under one name."""
    write_atomically(path, lambda beside: OmegaConf.save(OmegaConf.create(dict(content)), beside))


def resolve(content: Mapping[str, Any], path: Path) -> DictConfig:
    try:
        resolved: Any = OmegaConf.create(OmegaConf.to_container(OmegaConf.create(dict(content)), resolve=True))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path} refers to what is not there: {brief(error)}") from error
    return resolved


def read_configuration(path: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """A run's saved configuration, not resolved; raises UserError for one that is none or asks too much.

    ``asked`` is what the command line says, not resolved: what stands there may be named here, too.
    """
    content = read_plain(path)
    check_targets(content, {*known_targets(), *targets_in(asked)}, path)
    for name, value in flatten(content).items():
        if "${" in str(value) and at(asked, name) != value:
            raise UserError(
                f"{path} has an expression for {name} ({hide(str(value))}), which is only followed where the command "
                f"line says the same: give {name}= as when the run began"
            )
    return content


def read_saved(path: Path, configurations: Path) -> dict[str, Any]:
    """The saved configuration of a run that nobody asks for by options; raises UserError."""
    content = read_plain(path)
    check_targets(content, set(targets_of(configurations)), path)
    for name, value in flatten(content).items():
        if "${" in str(value):
            raise UserError(f"{path} has an expression for {name} ({hide(str(value))}), which is not followed here")
    return content


def read_plain(path: Path) -> dict[str, Any]:
    """YAML of a modest size without aliases, which a few lines make grow beyond all bounds; raises UserError."""
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is no configuration of a run: it has {path.stat().st_size:,} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        check_events(text)
        content = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no configuration of a run, or damaged: {brief(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} is no configuration of a run: it holds no options")
    return {str(name): value for name, value in content.items()}


def check_events(text: str) -> None:
    """Raise UserError for aliases and for very deep nesting; nothing is built."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MOST_DEPTH:
            raise UserError("it has aliases, or is nested too deep")


def check_targets(content: Any, known: set[str], path: Path) -> None:
    for target in targets_in(content):
        if target not in known:
            raise UserError(
                f"{path} asks to call {target}, which none of the configurations here names. If the run is yours, give "
                "the option that brought it in as when the run began; if it came from elsewhere, do not trust it"
            )


def targets_in(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            if name == "_target_":
                yield str(child)
            else:
                yield from targets_in(child)
    elif isinstance(node, list):
        for child in node:
            yield from targets_in(child)


def known_targets() -> Iterator[str]:
    """What the configurations that the command was composed from name, chosen or not."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    for source in sources:
        if source.schema == "file":
            yield from targets_of(Path(source.path))


def targets_of(configurations: Path) -> Iterator[str]:
    for path in configurations.rglob("*.yaml"):
        yield from TARGET.findall(path.read_text(encoding="utf-8"))


def check_numbers(saved: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    """Refuse a text or a list where a number or a switch belongs; raises UserError."""
    for name, value in flatten(saved).items():
        if isinstance(value, str | list) and isinstance(at(asked, name), int | float) and name not in WORD_OR_NUMBER:
            raise UserError(f"{path} is damaged: {name}={hide(str(value))} is no number, as {at(asked, name)} is one")


def check_places(saved: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    """Refuse to write outside the run's folder, unless the command line says the same; raises UserError."""
    run = str(asked["paths"]["run"])
    for part in WRITERS:
        for name, value in flatten(saved.get(part), part).items():
            outside = PLACE.search(name) and value is not None and not is_inside(str(value), run)
            if outside and at(asked, name) != value:
                raise UserError(
                    f"{path} has {name}={value}, which is outside the run's folder {run}: give {name}= as when the "
                    "run began, or do not trust a run that came from elsewhere"
                )


def is_inside(place: str, folder: str) -> bool:
    return Path(os.path.abspath(place)).is_relative_to(os.path.abspath(folder))


def moved(content: Any, before: str, now: str) -> Any:
    """The configuration with the run folder's old place replaced, for a folder that was moved."""
    if isinstance(content, dict):
        return {name: moved(child, before, now) for name, child in content.items()}
    inside = isinstance(content, str) and before and (content == before or content.startswith(f"{before}/"))
    return now + content[len(before) :] if inside else content


def differences(saved: Any, asked: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted name → (saved value, asked value) where two configurations differ; secrets are not told."""
    before, now = flatten(OmegaConf.to_container(saved)), flatten(OmegaConf.to_container(asked))
    shown_before, shown_now = (flatten(without_secrets(OmegaConf.to_container(cfg))) for cfg in (saved, asked))
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return {name: (shown_before.get(name), shown_now.get(name)) for name in names}


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {
        name: value
        for key, child in node.items()
        for name, value in flatten(child, f"{path}.{key}".lstrip(".")).items()
    }
