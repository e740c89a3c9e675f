"""Configurations as Hydra composes them. The choices of groups are composed once, which takes most of the time."""

from __future__ import annotations

import copy
from functools import cache

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

import ipa.cli  # registers what the configuration interpolates
from ipa.overrides import key_of

CONF = ipa.cli.CONF


def composed(config: str, *overrides: str) -> DictConfig:
    """With its node ``hydra``; of a sweep the first job."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        parsed = [each for override in overrides for each in first_of_sweep(override, parser)]
        is_choice = [(CONF / key_of(each)).is_dir() or each.startswith("hydra.searchpath") for each in parsed]
        cfg = copy.deepcopy(chosen(config, tuple(each for each, group in zip(parsed, is_choice, strict=True) if group)))
        values = [each for each, group in zip(parsed, is_choice, strict=True) if not group]
        ConfigLoaderImpl._apply_overrides_to_config(parser.parse_overrides(values), cfg)
        cfg.hydra.overrides.task = [each for each in parsed if not each.startswith("hydra")]
        return cfg


@cache
def chosen(config: str, choices: tuple[str, ...]) -> DictConfig:
    return hydra.compose(config, list(choices), return_hydra_config=True)


def first_of_sweep(override: str, parser: OverridesParser) -> list[str]:
    """``seed=1,2`` → ``seed=1``; ``method=glob(*)`` stays the default."""
    (parsed,) = parser.parse_overrides([override])
    if not parsed.is_sweep_override():
        return [override]
    values = parsed.sweep_string_iterator() if parsed.is_choice_sweep() or parsed.is_range_sweep() else ()
    return [f"{parsed.get_key_element()}={value}" for value in values][:1]
