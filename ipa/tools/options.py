"""The command line of the tools: ``key=value`` arguments, merged into a data class by OmegaConf.

    @dataclass
    class Options:
        adapter: str = option(MISSING, "an adapter file")
        rows: int = option(8, "images of the grid", at_least=1)

    main = tool(Options, do, __doc__)

``positional=("folder", "out")`` lets arguments without a name set these fields, in this order.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ipa.cli import explain_failure, refuse_pickles, typed_values
from ipa.errors import UserError
from ipa.overrides import nearest
from ipa.ranges import Range
from ipa.secrets import hide

MAX_LISTED = 10  # options in a message
TYPES = {str: "a text"}
LISTS: dict[Any, Any] = {list[str]: str, list[float]: float, list[int]: int}


def option(
    default: Any, help: str, *, at_least: float | None = None, at_most: float | None = None, one_of: Sequence[str] = ()
) -> Any:
    """A field of an ``Options`` class: its default (MISSING for a required option), its meaning, and its limits."""
    metadata = {"help": help, "limits": (at_least, at_most), "one_of": one_of}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def read_options(
    arguments: Sequence[str], kind: type[Any], positional: Sequence[str] = (), saved: Mapping[str, Any] | None = None
) -> Any:
    """Arguments → options; raises UserError for one that is misspelled, wrong, given twice or missing.

    ``saved`` takes the place of the defaults.
    """
    known, hints = {each.name: each for each in fields(kind)}, get_type_hints(kind)
    options: Any = OmegaConf.structured(kind)
    before = [(name, value, False) for name, value in (saved or {}).items()]
    for name, value, is_typed in before + [(*each, True) for each in named(arguments, list(known), positional)]:
        try:
            parsed = parse(value, hints[name]) if is_typed else value
            options = OmegaConf.merge(options, {name: read(parsed, known[name], hints[name])})
        except (OmegaConfBaseException, ValueError, TypeError):
            raise UserError(f"{name}={value}: give {possible(known[name], hints[name])}") from None
    if missing := [name for name in known if OmegaConf.is_missing(options, name)]:
        raise UserError(f"please give {' and '.join(f'{name}=…' for name in missing)}")
    return options


def named(arguments: Sequence[str], names: Sequence[str], positional: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The name of the option that each argument sets, and the value."""
    remaining = iter(positional)
    filled: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if positional and not re.match(r"[^\W\d]\w*=", argument):  # a path may contain = after a / or a .
            name, equals, value = next(remaining, ""), "=", argument
        if not equals or name not in names:
            raise UserError(unknown(argument, name, names, positional))
        if name in positional and name in filled:
            raise UserError(f"{name} is given twice, {filled[name]!r} and {value!r}")
        filled[name] = value
        yield name, value


def unknown(argument: str, name: str, names: Sequence[str], positional: Sequence[str]) -> str:
    """The message for an argument that sets no option; its ``name`` is empty if there are too many without a name."""
    listed = ", ".join(f"{each}=" for each in names) if len(names) <= MAX_LISTED else "that --help lists"
    if positional and not name:
        places = " ".join(place.upper() for place in positional)
        return f"{argument!r} is one argument too many: after {places} come the options {listed}"
    near = nearest(name, names)
    question = f"Did you mean {' or '.join(f'{each}=…' for each in near)}? " if near else ""
    return f"{question}{argument!r} is not one of the options {listed}"


def parse(typed: str, hint: Any) -> Any:
    """The value as YAML, as in Hydra; but a text needs no quotes, and a list of one needs no brackets."""
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={typed}"]))
        value = parsed["value"]
    except yaml.YAMLError:
        value = typed
    if hint in LISTS:
        return value if isinstance(value, list) else [typed if hint == list[str] else value]
    if str not in kinds_of(hint) or isinstance(value, str):
        return value
    return None if typed == "null" and NoneType in kinds_of(hint) else typed


def as_arguments(kind: type[Any], settings: Mapping[str, Any]) -> list[str]:
    """The arguments that ``read_options`` reads these settings from; defaults are left out."""
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(kind))
    hints = get_type_hints(kind)
    return [f"{name}={as_typed(value, hints[name])}" for name, value in settings.items() if value != defaults[name]]


def as_typed(value: Any, hint: Any) -> str:
    """What ``parse`` reads as this value, without quotes and brackets where it can be."""
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    plain = one if isinstance(one, str) else json.dumps(one)
    with suppress(OmegaConfBaseException):
        if parse(plain, hint) == value:
            return plain
    return json.dumps(value, ensure_ascii=False)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """``int | None`` → ``int`` and ``NoneType``."""
    return (LISTS[hint],) if hint in LISTS else get_args(hint) or (hint,)


def range_of(known: Field[Any], hint: Any) -> Range | None:
    """The range of a number or switch."""
    kinds, (low, high) = kinds_of(hint), known.metadata["limits"]
    return next((Range(kind, low, high, null=NoneType in kinds) for kind in kinds if kind in (int, float, bool)), None)


def read(value: Any, known: Field[Any], hint: Any) -> Any:
    """The value that is meant; raises ValueError or TypeError for one that the option cannot have."""
    if within := range_of(known, hint):
        return [within.read(each) for each in value] if hint in LISTS else within.read(value)
    if value is not None and known.metadata["one_of"] and value not in known.metadata["one_of"]:
        raise ValueError(value)
    return value


def possible(known: Field[Any], hint: Any) -> str:
    """The possible values of an option in words: "an integer at least 1"."""
    if known.metadata["one_of"]:
        return f"one of {', '.join(known.metadata['one_of'])}"
    one = str(range_of(known, hint) or " or ".join(TYPES.get(kind, "null") for kind in kinds_of(hint)))
    return f"{one}, or a list [a,b]" if hint in LISTS else one


def describe(kind: type[Any], positional: Sequence[str] = ()) -> str:
    """The help for all options: default, possible values, meaning."""
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(kind))
    lines = [f"Options (KEY=VALUE{', or VALUE for ' + ' and '.join(positional) if positional else ''})"]
    for known in fields(kind):
        default = defaults[known.name]
        shown = "(required)" if default == MISSING else default if isinstance(default, str) else json.dumps(default)
        lines += ["", f"  {known.name}={shown}", f"      {known.metadata['help']}"]
        lines[-1] += f" ({possible(known, get_type_hints(kind)[known.name])})"
    return "\n".join(lines)


def tool(kind: type[Any], do: Callable[[Any], Path | None], about: str | None, **options: Any) -> Callable[[], None]:
    """``run_tool`` with the arguments of this process."""
    return lambda: run_tool(sys.argv[1:], kind, do, about, **options)


def run_tool(
    arguments: Sequence[str],
    kind: type[Any],
    do: Callable[[Any], Path | None],
    about: str | None,
    positional: Sequence[str] = (),
    saved: Callable[[], Mapping[str, Any]] | None = None,
) -> None:
    """Print the help, or call ``do`` with the options; errors that the user can fix end the process with a message."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{about}\n{describe(kind, positional)}")
        return
    refuse_pickles()
    logging.basicConfig(format="%(message)s")  # before a library chooses its own
    values: list[Any] = [typed_values(arguments)]
    try:
        options = read_options(arguments, kind, positional, saved and saved())
        values.append(OmegaConf.to_container(options))
        written = do(options)
    except Exception as error:
        message = explain_failure(error, values)
        if message is None:
            raise
        script = Path(sys.argv[0])  # of a package: pack/__main__.py
        sys.exit(hide(f"{script.parent.name if script.stem == '__main__' else script.stem}: {message}"))
    if written is not None:
        print(f"wrote {written}")
