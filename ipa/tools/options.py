"""How the tools read their command line: ``key=value`` words against a data class, errors in one line.

@dataclass
class Options:
    adapter: str = MISSING  # comments after fields are for readers of the code

run_tool(sys.argv[1:], Options, do, __doc__)
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException


def read_options(arguments: list[str], kind: type[Any]) -> Any:
    """Words → options; raises ValueError that names what is misspelt, wrong or missing."""
    defaults = {field.name: field.default for field in fields(kind)}
    types = {field.name: field.type for field in fields(kind)}
    options = OmegaConf.structured(kind)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in defaults:
            near = difflib.get_close_matches(name, list(defaults), 1)
            question = f" Did you mean {near[0]}=…?" if near else ""
            raise ValueError(
                f"{argument!r} is not one of the options {', '.join(f'{n}=' for n in defaults)}.{question}"
            )
        try:
            options[name] = value_of(value, is_list=str(types[name]).startswith("list"))
        except OmegaConfBaseException as error:
            raise ValueError(f"{argument}: {str(error).splitlines()[0]}") from error
    missing = [name for name in defaults if OmegaConf.is_missing(options, name)]
    if missing:
        raise ValueError(f"please give {' and '.join(f'{name}=…' for name in missing)}")
    return options


def value_of(word: str, is_list: bool) -> Any:
    """None for ``null``; ``[a,b]`` and ``a`` as lists where a list is wanted; else the word itself."""
    if word == "null":
        return None
    if not is_list:
        return word
    inside = word[1:-1].split(",") if word.startswith("[") and word.endswith("]") else [word]
    return [part.strip() for part in inside if part.strip()]


def run_tool(arguments: list[str], kind: type[Any], do: Callable[[Any], Path | None], about: str | None) -> None:
    """Help, or ``do`` with the options; what the user can mend ends the process with one message."""
    name = Path(sys.argv[0]).stem
    if not arguments or {"-h", "--help"} & set(arguments):
        print(about)
        for field in fields(kind):
            default = "(needed)" if field.default is MISSING else field.default
            print(f"    {field.name}={'' if default in (None, NO_DEFAULT) else default}")
        return
    try:
        written = do(read_options(arguments, kind))
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    if written is not None:
        print(f"wrote {written}")
