"""Shards → a pairing index: the rows of each shard, in parallel and resumable, then the groups over all of them.

The rows of a finished shard are kept next to the index until it is complete, so the same command resumes.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipa.data.addresses import digest
from ipa.data.pairs.index import Array, key_hash, write_index
from ipa.data.pairs.options import Pairs
from ipa.data.records import Record, Source
from ipa.data.shards.fields import METADATA
from ipa.data.shards.names import is_remote, shard_name
from ipa.data.shards.source import ShardSource, read_shard
from ipa.data.shards.tar import Member, read_members
from ipa.errors import UserError
from ipa.files import remove_temporaries, write_atomically

NO_VALUE = 0  # in place of the hash of an entry
MAX_ROWS = 1 << 32
LISTED_MEMBERS, LISTED_NAMES = 100, 20


def value_hash(value: Any) -> int:
    """Texts and numbers are values; lists, objects, blank texts, NaN and null are none.

    7 and 7.0 are the same: pandas stores the integers of a column as floats where one is missing.
    """
    if isinstance(value, float):
        value = None if not isfinite(value) else int(value) if value.is_integer() else value
    if not isinstance(value, str | int | float) or not str(value).strip():
        return NO_VALUE
    return digest("value", str(value).strip()) or 1


@dataclass(frozen=True)
class Job:
    """A shard of pictures; ``features`` is the cache's shard of the same name, where the partners will be read."""

    source: ShardSource
    shard: str
    features: tuple[Source, str] | None = None

    @property
    def read(self) -> str:
        """The shard that training reads."""
        return self.features[1] if self.features else self.shard

    def part(self, folder: Path, columns: Sequence[str]) -> Path:
        """Its rows, in a file of their own; the name changes with the shards and with how they are read."""
        stats = [
            part for path in (self.shard, self.read) for part in (os.path.getsize(path), os.stat(path).st_mtime_ns)
        ]
        return folder / f"{digest(self.source.layout_fingerprint(), shard_name(self.shard), *stats, *columns):016x}.npy"


def rows_of(job: Job, columns: Sequence[str]) -> NDArray[Any]:
    """A row per sample of the shard. A sample that training rejects has no values, so it is never a partner."""
    found = [
        (each.index, (each.span[0], each.span[1] - each.span[0], key_hash(each.key), *map(value_hash, each.values)))
        for each in read_shard(job.shard, replace(job.source.layout, columns=tuple(columns)))
        if isinstance(each, Record)
    ]
    values = [(f"value.{number}", np.uint64) for number in range(len(columns))]
    row_type = np.dtype([("offset", np.int64), ("length", np.uint32), ("key", np.uint64), *values])
    rows = np.zeros(1 + max((index for index, _ in found), default=-1), row_type)
    for index, row in found:
        rows[index] = row
    if job.features is not None:
        point_to_features(rows, *job.features)
    return rows


def point_to_features(rows: NDArray[Any], source: Source, shard: str) -> None:
    rows["offset"], rows["length"] = 0, 0
    for record in source.read(shard):
        if isinstance(record, Record) and not record.broken and record.index < len(rows):
            rows["offset"][record.index], rows["length"][record.index] = record.span[0], len(record.picture)


def make_part(job: Job, folder: Path, columns: Sequence[str]) -> Path:
    path = job.part(folder, columns)
    if not path.exists():
        written = io.BytesIO()
        np.save(written, rows_of(job, columns))
        write_atomically(path, lambda temporary: temporary.write_bytes(written.getbuffer()))
    return path


def list_jobs(sources: Sequence[Source], caches: Mapping[str, Source] | None = None) -> list[Job]:
    """Raises UserError for shards in which single samples cannot be read, and for a cache of other shards."""
    jobs = []
    for source in sources:
        assert isinstance(source, ShardSource), "features have no metadata"
        check_seekable(source.shards)
        features = {} if caches is None else features_of(source, caches[source.name])
        jobs += [Job(source, shard, features.get(shard_name(shard))) for shard in source.shards]
    return jobs


def features_of(source: ShardSource, cache: Source) -> dict[str, tuple[Source, str]]:
    """By the name of the shard of pictures."""
    paths = {shard_name(path): path for path in cache.shards}
    if missing := [name for name in map(shard_name, source.shards) if name not in paths]:
        raise UserError(f"the cache of {source.name} has no shard {missing[0]}, which the pictures have")
    check_seekable(list(paths.values()))
    return {name: (cache, path) for name, path in paths.items()}


def check_local(shards: Sequence[str]) -> None:
    """Partners are read anywhere in a shard."""
    if remote := [shard for shard in shards if is_remote(shard)]:
        raise UserError(
            f"data.pairs reads single samples anywhere in the shards, and {shard_name(remote[0])} is remote. Copy the "
            "shards to a local or shared disk, or train from a feature cache there (docs/pairs.md)"
        )


def check_seekable(shards: Sequence[str]) -> None:
    check_local(shards)
    for name, times in Counter(map(shard_name, shards)).items():
        if times > 1:
            raise UserError(f"{times} shards are called {name}: data.pairs needs different names within a source")
    for shard in shards:
        with open(shard, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise UserError(f"data.pairs reads single samples out of shards, but {shard} is compressed: unpack it")


def build_index(
    jobs: Sequence[Job],
    pairs: Pairs,
    path: Path,
    workers: int,
    count: Callable[[int], object] = lambda shards: None,
    parts_in: Path | None = None,
) -> dict[str, Any]:
    """Write the index and return its metadata; ``count`` is called with the number of finished shards of each call.

    The shards' parts are kept in ``parts_in``, by default next to the index, from where a second call takes them.
    Raises UserError for an entry that no sample has, and if no sample has a partner.
    """
    folder = parts_in or path.with_name(f".{path.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(job.part(folder, pairs.columns) for job in jobs)
    make = partial(make_part, folder=folder, columns=pairs.columns)
    parts = []
    made: Iterator[Path] = map(make, jobs)
    with ExitStack() as stack:
        if workers > 1:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))
            made = stack.enter_context(pool).map(make, jobs)
        for part in made:
            parts.append(part)
            count(1)
    try:
        about, arrays = assemble(jobs, [np.load(part, allow_pickle=False) for part in parts], pairs)
        write_index(path, about, arrays)
        return about
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def assemble(
    jobs: Sequence[Job], parts: Sequence[NDArray[Any]], pairs: Pairs
) -> tuple[dict[str, Any], dict[str, Array]]:
    rows = np.concatenate(parts)
    if len(rows) >= MAX_ROWS:
        raise UserError(f"{len(rows):,} samples are more than an index holds ({MAX_ROWS - 1:,})")
    arrays = {
        "shard_rows": np.cumsum([0, *map(len, parts)], dtype=np.int64),
        "offsets": np.ascontiguousarray(rows["offset"]),
        "lengths": np.ascontiguousarray(rows["length"]),
        "keys": np.ascontiguousarray(rows["key"]),
    }
    usable, differs = rows["key"] != 0, np.arange(len(rows), dtype=np.uint32)
    complete = usable
    if pairs.differ:
        values = rows[f"value.{len(pairs.by)}"]
        check_any(values, pairs.differ, "differ", jobs)
        differs = np.unique(values, return_inverse=True)[1].astype(np.uint32)
        complete = usable & (values != NO_VALUE)
    arrays["differs"] = differs
    for level, name in enumerate(pairs.by):
        check_any(rows[f"value.{level}"], name, "by", jobs)
        arrays |= level_arrays(level, rows[f"value.{level}"], differs, complete)
    report = describe_levels(arrays, usable, [rows[f"value.{level}"] != NO_VALUE for level in range(len(pairs.by))])
    if report["alone"] == report["samples"]:
        raise UserError(
            f"{pairs}: none of {report['samples']:,} samples has a partner, since every group has only one sample"
            f"{f' or one {pairs.differ}' if pairs.differ else ''}. Give a coarser group"
        )
    about = {
        "by": list(pairs.by),
        "differ": pairs.differ,
        "of": "features" if jobs[0].features else "pictures",
        "sources": sources_of(jobs, parts),
        "report": report,
    }
    grouping = b"".join(arrays[name].tobytes() for name in sorted(arrays) if name not in ("offsets", "lengths"))
    hashed = hashlib.blake2b(grouping, digest_size=16).hexdigest()
    return about | {"fingerprint": f"{digest(pairs.differ or '', *pairs.by, hashed):016x}"}, arrays


def sources_of(jobs: Sequence[Job], parts: Sequence[NDArray[Any]]) -> list[dict[str, Any]]:
    """Each source with its shards: name, size in bytes, number of rows."""
    found: dict[str, dict[str, Any]] = {}
    for job, part in zip(jobs, parts, strict=True):
        source = job.features[0] if job.features else job.source
        entry = {"name": source.name, "layout": source.layout_fingerprint(), "shards": []}
        found.setdefault(source.name, entry)["shards"].append(
            [shard_name(job.shard), os.path.getsize(job.read), len(part)]
        )
    return list(found.values())


def level_arrays(level: int, values: Array, differs: Array, complete: Array) -> dict[str, Array]:
    """The groups of one entry: see the module ``index``."""
    members = np.flatnonzero(complete & (values != NO_VALUE)).astype(np.uint32)
    distinct, group_of = np.unique(values[members], return_inverse=True)
    groups = np.full(len(values), -1, np.int32)
    groups[members] = group_of
    order = np.lexsort((members, differs[members], group_of))
    counts = np.bincount(group_of, minlength=len(distinct))
    return {
        f"groups.{level}": groups,
        f"starts.{level}": np.cumsum([0, *counts], dtype=np.int64),
        f"members.{level}": members[order],
        f"differs.{level}": differs[members][order],
    }


def check_any(values: Array, name: str, option: str, jobs: Sequence[Job]) -> None:
    if not values.any():
        raise UserError(
            f"{option}={name}: none of {len(values):,} samples has json.{name}. {known_names(jobs[0].shard)}"
        )


def known_names(shard: str) -> str:
    """The entries of the metadata at the begin of a shard."""
    names: dict[str, None] = {}
    for member in islice(read_members(shard), LISTED_MEMBERS):
        if isinstance(member, Member) and member.name.endswith(f".{METADATA}"):
            try:
                names |= dict.fromkeys(json.loads(member.content))
            except (ValueError, TypeError, RecursionError):
                continue
    listed = ", ".join(list(names)[:LISTED_NAMES])
    return f"The metadata in {shard_name(shard)} have {listed}" if listed else f"{shard_name(shard)} has no metadata"


def describe_levels(arrays: Mapping[str, Array], usable: Array, have_value: Sequence[Array]) -> dict[str, Any]:
    """Counts of usable samples: the groups and paired samples of each level, and the samples left ``alone``."""
    waiting, levels = usable.copy(), []
    for level, have in enumerate(have_value):
        starts, members = arrays[f"starts.{level}"], arrays[f"members.{level}"]
        sizes = np.diff(starts)
        paired = np.zeros(len(usable), bool)
        paired[members[has_others(np.repeat(np.arange(len(sizes)), sizes), arrays[f"differs.{level}"], sizes)]] = True
        levels.append(
            {
                "groups": len(sizes),
                "of_one": int((sizes == 1).sum()),
                "smallest": int(sizes.min()) if len(sizes) else 0,
                "median": float(np.median(sizes)) if len(sizes) else 0.0,
                "largest": int(sizes.max()) if len(sizes) else 0,
                "without": int((usable & ~have).sum()),
                "paired": int((waiting & paired).sum()),
            }
        )
        waiting &= ~paired
    return {"samples": int(usable.sum()), "levels": levels, "alone": int(waiting.sum())}


def has_others(group_of: Array, differs: Array, sizes: Array) -> Array:
    """Which members have one in their group that differs from them; both arrays are sorted as in the index."""
    new = np.ones(len(differs), bool)
    new[1:] = (group_of[1:] != group_of[:-1]) | (differs[1:] != differs[:-1])
    blocks = np.cumsum(new) - 1
    return sizes[group_of] > np.bincount(blocks)[blocks] if len(differs) else new


def in_words(about: Mapping[str, Any]) -> list[str]:
    report, lines = about["report"], list[str]()
    left = report["samples"]
    for name, level in zip(about["by"], report["levels"], strict=True):
        samples = f"{left:,} samples{' that are left' if left < report['samples'] else ''}"
        left -= level["paired"]
        lines.append(
            f"pairs by {name}: {level['paired']:,} of {samples} have a partner here; "
            f"{level['groups']:,} groups of {level['smallest']:,} to {level['largest']:,} samples (median "
            f"{level['median']:,.0f}), {level['of_one']:,} of them of one sample; {level['without']:,} samples without "
            f"json.{name}"
        )
    if about["differ"]:
        lines[-1] += f"; partners differ in json.{about['differ']}"
    if report["alone"]:
        share = 100 * report["alone"] / report["samples"]
        lines.append(f"{report['alone']:,} samples ({share:.1f} %) have no partner and are their own reference")
    return lines
