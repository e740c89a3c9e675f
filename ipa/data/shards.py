"""Shard specifications → a list of shards, checked before anything is loaded; and how a shard is opened.

A specification is one of these, relative paths starting in the working directory:

    data/train                            a folder: its *.tar, sorted
    data/train/*.tar                      a glob
    data/{00000..00099}.tar               braces; every one must be there
    [laion/{00000..00099}.tar, coyo]      a list of these
    shards.txt                            a file of these, one a line: a configuration is slow with many thousands
    s3://…  https://…  pipe:…             what a program fetches: only the scheme is checked

Only addresses whose scheme is among ``schemes`` are taken; a ``pipe:`` runs its command in a shell, so it is not among
them unless the user says so. A plain path counts as ``file``.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import IO, cast
from urllib.parse import urlparse
from urllib.request import url2pathname

from braceexpand import braceexpand

from ipa.data.programs import FETCHERS
from ipa.errors import UserError
from ipa.secrets import hide

ENDINGS = (".tar", ".tar.gz", ".tgz")
WAYS = "Give a folder of .tar files, a glob ('shards/*.tar'), braces ('shards/{00000..00099}.tar'), or a list of these."
SHOWN = 8
REMOTE = re.compile(r"pipe:|[a-zA-Z][a-zA-Z0-9+.-]*://")
QUERY = re.compile(r"[?#].*$")
LISTED = re.compile(r"/$|[*{]")  # folders, globs, braces that were not understood
GROUP = re.compile(r"\{(?:(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?|([^{}]*))\}")
MOST_SHARDS, MOST_BRACES = 10_000_000, 100
SCHEMES = ("file", *FETCHERS)
TRUSTED = ("file", "https", "s3", "gs", "hf")  # unless the user says otherwise: who wrote what comes is known
Listing = Callable[[str], frozenset[str]]


class NoShards(UserError):
    """The shards asked for are not there."""


def expand_shards(
    spec: str | Sequence[str], schemes: Sequence[str] = TRUSTED, option: str = "data.schemes"
) -> list[str]:
    """All shards that ``spec`` names, in its order; raises ``NoShards``, naming the ``option`` that has the schemes."""
    check_schemes(schemes, option)
    if not is_text(spec) and not (isinstance(spec, Sequence) and all(map(is_text, spec))):
        raise NoShards(f"shards={spec}: {WAYS}")
    specs = [spec] if isinstance(spec, str) else list(spec)
    specs = [entry for entry in specs if entry.strip()]
    if not specs:
        raise NoShards(f"the list of shards is empty. {WAYS}")
    listing = lru_cache(maxsize=None)(names_in)  # a look-up per file is slow for 100,000 of them
    entries = [entry for spec in specs for entry in (read_list(spec) if is_list(spec) else [spec])]
    return [
        shard for entry in entries for shard in expand_entry(entry, partial(expand_pattern, schemes, option, listing))
    ]


def is_text(value: object) -> bool:
    return isinstance(value, str)


def check_schemes(schemes: Sequence[str], option: str) -> None:
    if (
        isinstance(schemes, str)
        or not isinstance(schemes, Sequence)
        or any(scheme not in SCHEMES for scheme in schemes)
    ):
        raise NoShards(f"{option}={schemes}: give a list of {', '.join(SCHEMES)}")


def is_list(entry: str) -> bool:
    return entry.endswith(".txt") and not is_remote(entry) and os.path.isfile(os.path.expanduser(entry))


def read_list(path: str) -> list[str]:
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            entries = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise NoShards(f"{path} is no list of shards: {error}") from error
    if not entries:
        raise NoShards(f"{path} is empty: it should name shards, one a line. {WAYS}")
    return entries


def expand_entry(entry: str, expand: Callable[[str], list[str]]) -> list[str]:
    check_entry(entry)
    patterns = list(braces(os.path.expanduser(entry)))
    found = [expand(pattern) for pattern in patterns]
    missing = [pattern for pattern, shards in zip(patterns, found, strict=True) if not shards]
    if missing:
        raise NoShards(explain(entry, missing, len(patterns)))
    return [shard for shards in found for shard in shards]


def check_entry(entry: str) -> None:
    """Refuse what would be listed without end, and what no name has."""
    number = prod(
        abs(int(last) - int(first)) + 1 if last else 1 + names.count(",") for first, last, names in GROUP.findall(entry)
    )
    if number > MOST_SHARDS or entry.count("{") > MOST_BRACES:
        raise NoShards(f"the braces of '{hide(entry[:100])}' stand for more than {MOST_SHARDS:,} shards")
    if "\0" in entry or "\n" in entry or "\r" in entry:
        raise NoShards(f"{hide(entry[:100])!r} has a zero or a line break in it, which no shard's name has")


def braces(entry: str) -> list[str]:
    try:
        return list(braceexpand(entry, escape=False))
    except ValueError as error:
        raise NoShards(f"the braces of '{hide(entry)}' are not understood: {error}. {WAYS}") from error


def expand_pattern(schemes: Sequence[str], option: str, listing: Listing, pattern: str) -> list[str]:
    """The shards of a pattern without braces; none if there is nothing."""
    check_allowed(pattern, schemes, option)
    if is_remote(pattern):
        check_remote(pattern)
        return [pattern]
    if not pattern.endswith(ENDINGS) and os.path.isdir(pattern):  # whatever its name, *, ? and [] in it too
        return sorted(os.path.join(pattern, name) for name in listing(pattern) if name.endswith(ENDINGS))
    if glob.has_magic(pattern):
        return sorted(path for path in glob.glob(pattern) if path.endswith(ENDINGS))
    folder, name = os.path.split(pattern)
    return [pattern] if name in listing(folder or ".") else []


def is_remote(shard: str) -> bool:
    return REMOTE.match(shard) is not None


def scheme_of(shard: str) -> str:
    return shard.partition(":")[0] if is_remote(shard) else "file"


def check_allowed(shard: str, schemes: Sequence[str], option: str) -> None:
    scheme = scheme_of(shard)
    if scheme in SCHEMES and scheme not in schemes:
        shell = ", and it runs a shell's command: see that it is your own" if scheme == "pipe" else ""
        raise NoShards(
            f"'{hide(shard)}' is not opened: {scheme} is not among {option}=[{','.join(schemes)}]{shell}. "
            f"{option}=[{','.join([*schemes, scheme])}] allows it"
        )


def check_remote(shard: str) -> None:
    """Whether its scheme is known and it names one archive; what a ``pipe:`` does is the shell's business."""
    scheme = scheme_of(shard)
    if scheme not in SCHEMES:
        raise NoShards(
            f"cannot open '{hide(shard)}': of '{scheme}:' nothing is known, only of {', '.join(sorted(SCHEMES))}."
        )
    if scheme != "pipe" and not shard.isprintable():
        raise NoShards(f"{hide(shard)!r} has characters that no address has")
    if scheme != "pipe" and LISTED.search(QUERY.sub("", shard)):
        raise NoShards(
            f"'{hide(shard)}' would have to be listed, which is not done from here: name each archive, many of them "
            f"with braces ('{scheme}://…/{{00000..00099}}.tar')."
        )


def open_shard(shard: str) -> IO[bytes]:
    """The archive as a stream of bytes; one of `ipa.data.programs` where such a one fetches it. Raises OSError."""
    scheme = scheme_of(shard)
    if scheme in FETCHERS:
        return cast(IO[bytes], FETCHERS[scheme](shard))
    path = url2pathname(urlparse(shard).path) if is_remote(shard) else os.path.abspath(shard)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is no regular file")  # reading a named pipe may never end
    return open(path, "rb")


def shard_name(shard: str) -> str:
    """The file name without its folders (and without a URL's query): the shard's part in a sample's address."""
    return QUERY.sub("", shard).rstrip("/").rsplit("/", 1)[-1] if is_remote(shard) else os.path.basename(shard)


def names_in(folder: str) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def explain(entry: str, missing: Sequence[str], asked: int) -> str:
    """What was looked for, where, what is there, and what to do."""
    folder, name = (missing[0], "") if os.path.isdir(missing[0]) else os.path.split(missing[0])
    what = f"no such shard: '{entry}'"
    if asked > 1:
        what = f"{len(missing)} of the {asked} shards of '{entry}' are missing: {some(missing)}"
    return f"{what}. {what_is_in(folder, name)} {WAYS}"


def what_is_in(folder: str, wanted: str) -> str:
    """The nearest folder that exists and what it holds, with the names most like ``wanted`` first."""
    looked = os.path.abspath(folder)
    if not os.path.isdir(looked):
        parent = os.path.dirname(looked)
        return f"The folder {looked} does not exist. " + what_is_in(parent, os.path.basename(looked))
    names = sorted(names_in(looked))
    near = difflib.get_close_matches(wanted, names, n=3)
    if not names:
        return f"The folder {looked} is empty."
    return f"The folder {looked} holds {some(near + [name for name in names if name not in near])}."


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
