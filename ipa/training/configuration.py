"""The configuration of a run: saved when it begins, and what wins when it goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ipa.checkpoint import write_atomically

log = logging.getLogger(__name__)

# how far to go and how to get there, which a run that goes on may be asked anew
MAY_CHANGE = ("trainer.max_steps", "schedule.num_training_steps", "data.num_workers", "logger", "paths", "group")


def settle_configuration(cfg: DictConfig, folder: Path, goes_on: bool) -> DictConfig:
    """Save the resolved configuration; for a run that goes on the saved one wins, and the differences are told.

    What is in ``MAY_CHANGE`` changes nothing of the steps already made and is taken as asked.
    """
    asked: Any = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    path = folder / "config.yaml"
    if not goes_on:
        write_atomically(path, lambda beside: OmegaConf.save(asked, beside))
        return asked
    saved: Any = OmegaConf.load(path)
    log.info("%s has a checkpoint: this run goes on from there with its saved configuration", folder)
    saved = moved(saved, saved.paths.run, asked.paths.run)
    for name in MAY_CHANGE:
        if OmegaConf.select(asked, name) is not None:  # there may be no schedule
            OmegaConf.update(saved, name, OmegaConf.select(asked, name), merge=False)
    for name, (before, now) in differences(saved, asked).items():
        log.warning("%s stays %s; you asked for %s, which needs a run of its own (another name=)", name, before, now)
    write_atomically(path, lambda beside: OmegaConf.save(saved, beside))
    return saved


def moved(cfg: Any, before: str, now: str) -> Any:
    """The configuration with the run folder's old place replaced, for a folder that was moved."""

    def move(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: move(child) for name, child in node.items()}
        inside = isinstance(node, str) and (node == before or node.startswith(f"{before}/"))
        return now + node[len(before) :] if inside else node

    return OmegaConf.create(move(OmegaConf.to_container(cfg)))


def differences(saved: Any, asked: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted name → (saved value, asked value) where two configurations differ."""
    before, now = flatten(OmegaConf.to_container(saved)), flatten(OmegaConf.to_container(asked))
    names = sorted(before.keys() | now.keys())
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {
        name: value
        for key, child in node.items()
        for name, value in flatten(child, f"{path}.{key}".lstrip(".")).items()
    }
