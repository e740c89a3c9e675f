"""Errors that a user can fix. Everything else is a bug and keeps its traceback. Imports only the standard library."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_MESSAGE_LENGTH = 300
SCHEME = re.compile(r"^[a-z][\w-]+:(//)?")  # local-dir:FOLDER, file://PATH


class UserError(ValueError):
    """Raised on purpose for what the user can fix; the message says what was given, what is possible, what to do.

    Every command prints it, and an ``OSError`` at a file that the user named, without a traceback.
    """


class MissingWeights(UserError):
    """Weights, or a package, that are neither here nor downloadable; the message says what to get and where it goes."""


def explain(error: BaseException, named: Any = ()) -> str | None:
    """The message for an error that the user can fix; None for a bug.

    ``named`` holds the values of the command line and of the configuration, nested as they are. An ``OSError`` is the
    user's if its file is, or is in, a path among them.
    """
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError):
        return None
    known = [os.path.abspath(each) for each in _paths(named)]
    is_named = any(Path(os.path.abspath(file)).is_relative_to(path) for file in _files(error) for path in known)
    return f"{type(error).__name__}: {error}" if is_named else None


def _files(error: OSError) -> list[str]:
    if isinstance(error.filename, str | bytes | os.PathLike):
        return [os.fsdecode(error.filename)]
    return [word.strip("'\"`.,:()") for word in str(error).split() if "/" in word]  # as for the hub's libraries


def _paths(node: Any) -> Iterator[Path]:
    """All strings in a nested structure, as paths; without ``.`` and ``/``, which contain every file."""
    if isinstance(node, Mapping):
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            yield from _paths(child)
    elif isinstance(node, str) and (path := Path(SCHEME.sub("", node))).name:
        yield path


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def brief(error: BaseException) -> str:
    """A library's error in one line: its type and the first sentence, shortened (torch's messages can fill a page)."""
    first = next(iter(str(error).splitlines()), "").partition(". ")[0]
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= MAX_MESSAGE_LENGTH else f"{text[:MAX_MESSAGE_LENGTH]} …"
