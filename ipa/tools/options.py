"""How the tools read their command line: ``key=value`` words against a data class, errors in one line.

@dataclass
class Options:
    adapter: str = MISSING  # comments after fields are for readers of the code

run_tool(sys.argv[1:], Options, do, __doc__)

``positional=("folder", "out")`` lets words without a name fill these fields, in this order.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ipa.cli import refuse_pickles
from ipa.errors import UserError
from ipa.secrets import hide


def option(default: Any, help: str, *, at_least: float | None = None, one_of: Sequence[str] = ()) -> Any:
    """A field of an options class: its default, the line that ``--help`` prints, and its limits."""
    return field(default=default, metadata={"help": help, "limits": (at_least, one_of)})


def check_limits(options: Any, kind: type[Any]) -> None:
    for each in fields(kind):
        value, (least, choices) = options[each.name], each.metadata.get("limits", (None, ()))
        if value is not None and ((least is not None and value < least) or (choices and value not in choices)):
            possible = f"one of {', '.join(choices)}" if choices else f"at least {least}"
            raise UserError(f"{each.name}={value}: give {possible}")


def read_options(arguments: Sequence[str], kind: type[Any], positional: Sequence[str] = ()) -> Any:
    """Words → options; raises UserError that names what is misspelt, wrong, doubled or missing."""
    types = {each.name: each.type for each in fields(kind)}
    options = OmegaConf.structured(kind)
    for argument, name, value in named(arguments, list(types), positional):
        try:
            options[name] = value_of(value, is_list=str(types[name]).startswith("list"))
        except OmegaConfBaseException as error:
            raise UserError(f"{argument}: {str(error).splitlines()[0]}") from error
    missing = [name for name in types if OmegaConf.is_missing(options, name)]
    if missing:
        raise UserError(f"please give {' and '.join(f'{name}=…' for name in missing)}")
    check_limits(options, kind)
    return options


def named(arguments: Sequence[str], names: Sequence[str], positional: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The words as they stand, each with the option that it sets and the value."""
    places = iter(positional)
    filled: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if positional and not re.match(r"[^\W\d]\w*=", argument):  # a path may hold = behind a / or a .
            name, equals, value = next(places, ""), "=", argument
        if not equals or name not in names:
            raise UserError(unknown(argument, name, names, positional))
        if name in positional and name in filled:
            raise UserError(f"{name} is given twice, {filled[name]!r} and {value!r}")
        filled[name] = value
        yield argument, name, value


def unknown(argument: str, name: str, names: Sequence[str], positional: Sequence[str]) -> str:
    """What to say of a word that sets no option; without a ``name`` it is one of those that need none."""
    listed = ", ".join(f"{n}=" for n in names)
    if positional and not name:
        places = " ".join(place.upper() for place in positional)
        return f"{argument!r} is one word too many: after {places} come the options {listed}"
    near = difflib.get_close_matches(name, names, 1)
    question = f" Did you mean {near[0]}=…?" if near else ""
    return f"{argument!r} is not one of the options {listed}.{question}"


def value_of(word: str, is_list: bool) -> Any:
    """None for ``null``; ``[a,b]`` and ``a`` as lists where a list is wanted; else the word itself."""
    if word == "null":
        return None
    if not is_list:
        return word
    inside = word[1:-1].split(",") if word.startswith("[") and word.endswith("]") else [word]
    return [part.strip() for part in inside if part.strip()]


def run_tool(
    arguments: Sequence[str],
    kind: type[Any],
    do: Callable[[Any], Path | None],
    about: str | None,
    positional: Sequence[str] = (),
) -> None:
    """Help, or ``do`` with the options; what the user can mend ends the process with one message."""
    script = Path(sys.argv[0])  # of a package: pack/__main__.py
    name = script.parent.name if script.stem == "__main__" else script.stem
    if not arguments or {"-h", "--help"} & set(arguments):
        print(about)
        for each in fields(kind):
            default = "(required)" if each.default is MISSING else each.default
            print(f"    {each.name}={'' if default in (None, NO_DEFAULT) else default}")
            print(f"        {each.metadata['help']}" if each.metadata else "", end="\n" if each.metadata else "")
        return
    refuse_pickles()
    try:
        written = do(read_options(arguments, kind, positional))
    except (UserError, OSError) as error:
        sys.exit(hide(f"{name}: {error}"))
    if written is not None:
        print(f"wrote {written}")
