"""What is wrong with the overrides of a Hydra command, with the nearest names and the quotes that are missing."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from ipa.errors import UserError

VERSION_BASE = "1.3"
REFUSED = (HydraException, OmegaConfBaseException, yaml.YAMLError, UserError)  # raised for a wrong command line


def as_typed(overrides: Any) -> list[str]:
    """Hydra's list of overrides with their ``${…}``, which reading its elements would resolve."""
    typed: Any = OmegaConf.to_container(overrides, resolve=False)
    return typed


def check_expanded(arguments: Sequence[str]) -> None:
    """Raise UserError where the shell expanded braces: the last of the values would count, silently."""
    for one, other in pairwise(arguments):
        key, _, value = one.partition("=")
        if key.startswith("data.") and other.startswith(f"{key}=") and other != one:
            raise UserError(
                f"{key} is given twice, {value} and {other.partition('=')[2]}. If these were braces, quote them for "
                f"shell and Hydra: '{key}=\"/data/{{00000..00099}}.tar\"'"
            )


def complaints_about(
    argv: list[str], config_dir: str, config_name: str, check: Callable[[DictConfig], object] = lambda cfg: None
) -> list[str]:
    """Hydra's message and the nearest names for every override that does not fit, and every such value of a sweep.

    ``check`` raises UserError for values that compose and cannot be used. Hydra stops at the first wrong override, so
    this tries them one by one, choices of groups first, because they determine the keys.
    """
    args = get_args_parser().parse_args(argv)
    config_name = args.config_name or config_name
    complaints: list[str] = []
    own = f"file://{os.path.abspath(args.config_dir)}" if args.config_dir else None
    accepted = [f"hydra.searchpath=[{quote_value(own)}]"] if own else []
    with hydra.initialize_config_dir(os.path.abspath(args.config_path or config_dir), version_base=VERSION_BASE):
        for override in sorted(args.overrides, key=lambda override: not group_options(key_of(override))):
            fitting = []
            for single in _each_value(override) if args.multirun else [override]:
                try:
                    check(hydra.compose(config_name, [*accepted, single]))
                    fitting.append(single)
                except REFUSED as error:
                    complaint = _quoting(single)
                    if complaint is None:
                        near = _nearest_overrides(single, config_name, accepted)
                        question = f"\nDid you mean {' or '.join(near)}?" if near and single not in near else ""
                        complaint = hydra_message(error) + question
                    complaints.append(complaint)
            accepted += fitting[:1]
    return complaints


def _quoting(override: str) -> str | None:
    """What to type for a value with characters of Hydra's grammar; None if that is not what is wrong."""
    key, equals, value = override.partition("=")
    quoted = f"{key}={quote_value(value)}"
    if not equals or _parses(override) or not _parses(quoted):
        return None
    return f"{override}: Hydra reads some of these characters as its grammar. Quote the value: {shlex.quote(quoted)}"


def _parses(override: str) -> bool:
    try:
        OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([override])
        return True
    except HydraException:
        return False


def quote_value(value: str) -> str:
    """Quoted for Hydra's grammar: the name of a folder may contain ``=`` or ``,``."""
    # a backslash escapes only before a quote, which the end is too
    return '"' + re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), value) + '"'


def hydra_message(error: Exception) -> str:
    message = str(error).split("\nConfig search path:")[0]  # Hydra's own paths
    if isinstance(error.__cause__, OmegaConfBaseException):
        message = f"{message}\n{str(error.__cause__).splitlines()[0]}"
    if isinstance(error, InterpolationResolutionError):  # the message of our resolver, without OmegaConf's frame
        message = message.partition(" raised while resolving interpolation: ")[2].split("\n    full_key:")[0] or message
    return message.strip()


def key_of(override: str) -> str:
    """The group or the key that an override sets: ``+data@x=y`` → ``data``."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def group_options(group: str) -> list[str]:
    """The choices of a group, without the parts that some share (``data/_common.yaml``)."""
    found = GlobalHydra.instance().config_loader().get_group_options(group)
    return [name for name in found if not name.startswith("_")]


def _each_value(override: str) -> list[str]:
    """``lr=1,2`` → ``lr=1`` and ``lr=2``; nothing for a sweep that a plug-in expands; any other override unchanged."""
    try:
        (parsed,) = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([override])
    except HydraException:
        return [override]
    if not parsed.is_sweep_override():
        return [override]
    if not (parsed.is_choice_sweep() or parsed.is_range_sweep()):
        return []
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]


def _nearest_overrides(override: str, config_name: str, accepted: list[str]) -> list[str]:
    """The override with existing names in place of the misspelled one, best first."""
    key, equals, value = override.partition("=")
    prefix, key = key[: len(key) - len(key.lstrip("+~"))], key.lstrip("+~")
    if options := group_options(key_of(override)):
        return [f"{prefix}{key}={name}" for name in nearest(value, options)]
    cfg = hydra.compose(config_name, accepted, return_hydra_config=key.startswith("hydra"))
    names = _keys(OmegaConf.to_container(cfg, resolve=False))
    if "." not in key:
        names += GlobalHydra.instance().config_loader().list_groups("")
    return [f"{prefix}{name}{equals}{value}" for name in nearest(key, names)]


def _keys(node: Any, path: str = "") -> list[str]:
    """Dotted names of all values: ``optimizer.lr`` …"""
    if not (isinstance(node, dict) and node):
        return [path]
    inside = {f"{path}.{key}".lstrip("."): value for key, value in node.items() if key != "_target_"}
    return [name for key, value in inside.items() for name in _keys(value, key)]


def nearest(name: str, names: Sequence[str], count: int = 3) -> list[str]:
    """Names whose last part is similar to that of ``name``, those with the most similar path first."""

    def likeness(other: str) -> tuple[float, float]:
        pairs = zip(name.rpartition(".")[::2], other.rpartition(".")[::2], strict=True)
        path, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return last, path

    close = {other: score for other in names if (score := likeness(other))[0] >= 0.6}
    return sorted(close, key=lambda other: -sum(close[other]))[:count]
