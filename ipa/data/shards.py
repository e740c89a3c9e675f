"""Shard specifications → a list of shards, checked before anything is loaded; and how a shard is opened.

A specification is one of these, relative paths starting in the working directory:

    data/train                            a folder: its *.tar, sorted
    data/train/*.tar                      a glob
    data/{00000..00099}.tar               braces; every one must be there
    [laion/{00000..00099}.tar, coyo]      a list of these
    shards.txt                            a file of these, one a line: a configuration is slow with many thousands
    s3://…  https://…  pipe:…             what WebDataset opens, and s3 by the aws program: only the scheme is checked
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import shlex
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import IO

from braceexpand import braceexpand
from webdataset.gopen import gopen, gopen_schemes

ENDINGS = (".tar", ".tar.gz", ".tgz")
WAYS = "Give a folder of .tar files, a glob ('shards/*.tar'), braces ('shards/{00000..00099}.tar'), or a list of these."
SHOWN = 8
REMOTE = re.compile(r"pipe:|[a-zA-Z][a-zA-Z0-9+.-]*://")
QUERY = re.compile(r"[?#].*$")
LISTED = re.compile(r"/$|[*{]")  # folders, globs, braces that were not understood
SCHEMES = {"s3", "file", *gopen_schemes} - {"__default__"}
Listing = Callable[[str], frozenset[str]]


class NoShards(ValueError):
    """The shards asked for are not there."""


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """All shards that ``spec`` names, in its order; raises ``NoShards``."""
    specs = [spec] if isinstance(spec, str) else list(spec)
    specs = [entry for entry in specs if entry.strip()]
    if not specs:
        raise NoShards(f"the list of shards is empty. {WAYS}")
    listing = lru_cache(maxsize=None)(names_in)  # a look-up per file is slow for 100,000 of them
    entries = [entry for spec in specs for entry in (read_list(spec) if is_list(spec) else [spec])]
    return [shard for entry in entries for shard in expand_entry(entry, listing)]


def is_list(entry: str) -> bool:
    return entry.endswith(".txt") and not is_remote(entry) and os.path.isfile(os.path.expanduser(entry))


def read_list(path: str) -> list[str]:
    with open(os.path.expanduser(path), encoding="utf-8") as file:
        entries = [line.strip() for line in file if line.strip()]
    if not entries:
        raise NoShards(f"{path} is empty: it should name shards, one a line. {WAYS}")
    return entries


def expand_entry(entry: str, listing: Listing) -> list[str]:
    patterns = list(braceexpand(os.path.expanduser(entry), escape=False))
    found = [expand_pattern(pattern, listing) for pattern in patterns]
    missing = [pattern for pattern, shards in zip(patterns, found, strict=True) if not shards]
    if missing:
        raise NoShards(explain(entry, missing, len(patterns)))
    return [shard for shards in found for shard in shards]


def expand_pattern(pattern: str, listing: Listing) -> list[str]:
    """The shards of a pattern without braces; none if there is nothing."""
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


def check_remote(shard: str) -> None:
    """Whether its scheme is known and it names one archive; what a ``pipe:`` does is the shell's business."""
    scheme = shard.partition(":")[0]
    if scheme not in SCHEMES:
        raise NoShards(f"cannot open '{shard}': of '{scheme}:' nothing is known, only of {', '.join(sorted(SCHEMES))}.")
    if scheme != "pipe" and LISTED.search(QUERY.sub("", shard)):
        raise NoShards(
            f"'{shard}' would have to be listed, which is not done from here: name each archive, many of them with "
            f"braces ('{scheme}://…/{{00000..00099}}.tar')."
        )


def open_shard(shard: str) -> IO[bytes]:
    """The archive as a stream of bytes."""
    if shard.startswith("s3://"):  # WebDataset knows no s3
        return gopen(f"pipe:aws s3 cp --quiet {shlex.quote(shard)} -")
    return gopen(shard if is_remote(shard) else os.path.abspath(shard))


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
