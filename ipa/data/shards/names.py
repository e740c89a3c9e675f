"""Shard specifications (docs/data.md, "Where shards can be stored") → a list of shards, checked at the start.

``pipe:`` runs its command in a shell, so the user must allow it.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

from braceexpand import braceexpand

from ipa.errors import UserError
from ipa.files import read_list
from ipa.secrets import hide

ENDINGS = (".tar", ".tar.gz", ".tgz")
WAYS = "Give a folder of .tar files, a glob ('shards/*.tar'), braces ('shards/{00000..00099}.tar'), or a list of these."
MAX_NAMES_SHOWN = 8
REMOTE = re.compile(r"pipe:|[a-zA-Z][a-zA-Z0-9+.-]*://")
QUERY = re.compile(r"[?#].*$")
LISTED = re.compile(r"/$|[*{]")  # folders, globs, braces that were not understood
GROUP = re.compile(r"\{(?:(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?|([^{}]*))\}")
MAX_SHARDS, MAX_BRACES = 10_000_000, 100
SCHEMES = ("file", "https", "http", "ftps", "sftp", "scp", "s3", "gs", "ais", "hf", "pipe")
TRUSTED = ("file", "https", "s3", "gs", "hf")  # the default: encrypted, or the user's own storage


class NoShards(UserError):
    """The specified shards do not exist."""


def expand_shards(
    spec: str | Sequence[str], schemes: Sequence[str] = TRUSTED, option: str = "data.schemes"
) -> list[str]:
    """All shards of ``spec``, in its order; raises ``NoShards``. ``option`` is the name of ``schemes`` in messages."""
    if isinstance(schemes, str) or not isinstance(schemes, Sequence) or any(each not in SCHEMES for each in schemes):
        raise NoShards(f"{option}={schemes}: give a list of {', '.join(SCHEMES)}")
    specs = [spec] if isinstance(spec, str) else spec
    if not isinstance(specs, Sequence) or not all(isinstance(entry, str) for entry in specs):
        raise NoShards(f"shards={spec}: {WAYS}")
    specs = [entry for entry in specs if entry.strip()]
    if not specs:
        raise NoShards(f"the list of shards is empty. {WAYS}")
    listing = lru_cache(maxsize=None)(names_in)  # a look-up per file is slow for 100,000 of them

    def expand(pattern: str) -> list[str]:
        check_scheme(pattern, schemes, option)
        return [pattern] if is_remote(pattern) else local_shards(pattern, listing)

    entries = [entry for spec in specs for entry in entries_in(spec)]
    return [shard for entry in entries for shard in expand_entry(entry, expand)]


def entries_in(spec: str) -> list[str]:
    """Those of a list of shards; any other specification itself."""
    path = os.path.expanduser(spec)
    if not spec.endswith(".txt") or is_remote(spec) or not os.path.isfile(path):
        return [spec]
    if entries := read_list(path):
        return entries
    raise NoShards(f"{spec} is empty: it should name shards, one a line. {WAYS}")


def expand_entry(entry: str, expand: Callable[[str], list[str]]) -> list[str]:
    check_number(entry)
    try:
        patterns = list(braceexpand(os.path.expanduser(entry), escape=False))
    except ValueError as error:
        raise NoShards(f"the braces of '{hide(entry)}' are not understood: {error}. {WAYS}") from error
    found = [expand(pattern) for pattern in patterns]
    if missing := [pattern for pattern, shards in zip(patterns, found, strict=True) if not shards]:
        raise NoShards(explain(entry, missing, len(patterns)))
    return [shard for shards in found for shard in shards]


def check_number(entry: str) -> None:
    """Refuse braces that expand to too many names for the memory."""
    groups = GROUP.findall(entry)
    number = prod(abs(int(last) - int(first)) + 1 if last else 1 + names.count(",") for first, last, names in groups)
    if number > MAX_SHARDS or entry.count("{") > MAX_BRACES:
        raise NoShards(f"the braces of '{hide(entry[:100])}' expand to more than {MAX_SHARDS:,} shards")


def local_shards(pattern: str, listing: Callable[[str], frozenset[str]]) -> list[str]:
    """The shards of a path or glob without braces; none if nothing is there."""
    if not pattern.endswith(ENDINGS) and os.path.isdir(pattern):  # even if its name has *, ? or [] in it
        return sorted(os.path.join(pattern, name) for name in listing(pattern) if name.endswith(ENDINGS))
    if glob.has_magic(pattern):
        return sorted(path for path in glob.glob(pattern) if path.endswith(ENDINGS))
    folder, name = os.path.split(pattern)
    return [pattern] if name in listing(folder or ".") else []


def is_remote(shard: str) -> bool:
    return REMOTE.match(shard) is not None


def check_scheme(shard: str, schemes: Sequence[str], option: str) -> None:
    """Refuse a scheme that is unknown or not allowed, and a URL that does not name one archive."""
    scheme = shard.partition(":")[0] if is_remote(shard) else "file"
    if scheme not in SCHEMES:
        raise NoShards(
            f"cannot open '{hide(shard)}': unknown scheme '{scheme}:', only of {', '.join(sorted(SCHEMES))}."
        )
    if scheme not in schemes:
        shell = ", and it runs a shell command: make sure that it is your own" if scheme == "pipe" else ""
        raise NoShards(
            f"'{hide(shard)}' is not opened: {scheme} is not among {option}=[{','.join(schemes)}]{shell}. "
            f"{option}=[{','.join([*schemes, scheme])}] allows it"
        )
    if not is_remote(shard) or scheme == "pipe":
        return
    if not shard.isprintable():
        raise NoShards(f"{hide(shard)!r} has characters that no address has")
    if LISTED.search(QUERY.sub("", shard)):
        raise NoShards(
            f"'{hide(shard)}' would have to be listed, which is not supported: name each archive, many of them "
            f"with braces ('{scheme}://…/{{00000..00099}}.tar')."
        )


def shard_name(shard: str) -> str:
    """The file name without its folders (and without a URL's query): the shard's part in a sample's address."""
    return QUERY.sub("", shard).rstrip("/").rsplit("/", 1)[-1] if is_remote(shard) else os.path.basename(shard)


def names_in(folder: str) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def explain(entry: str, missing: Sequence[str], asked: int) -> str:
    """What was looked for, what the nearest existing folder holds (names like the wanted one first), what to do."""
    what = f"no such shard: '{entry}'"
    if asked > 1:
        what = f"{len(missing)} of the {asked} shards of '{entry}' are missing: {some(missing)}"
    path = os.path.abspath(missing[0])
    folder, wanted = (path, "") if os.path.isdir(path) else os.path.split(path)
    while not os.path.isdir(folder):
        what += f". The folder {folder} does not exist"
        folder, wanted = os.path.split(folder)
    names = sorted(names_in(folder))
    near = difflib.get_close_matches(wanted, names, n=3)
    shown = some(near + [name for name in names if name not in near]) if names else "nothing"
    return f"{what}. The folder {folder} holds {shown}. {WAYS}"


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(names[:MAX_NAMES_SHOWN]) + more
