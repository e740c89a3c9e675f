"""Samples → NNNNN.tar and NNNNN_stats.json, named as img2dataset does.

What a shard holds depends on its samples alone: its bytes are the same on every day and with any number of workers. The
stats keep from which files it was made, so that a shard that is there already is known again.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ipa.data.rejects import Rejected
from ipa.data.shards.names import ENDINGS
from ipa.errors import UserError
from ipa.files import write_atomically
from ipa.tools.packing.folders import examples
from ipa.tools.packing.samples import NOT_SHRUNK, Making, Sample

OTHER_FOLDER = "choose another folder with out=FOLDER"


@dataclass(frozen=True)
class Shard:
    """A shard that is to be there; ``options`` are those that decide what it holds, for messages."""

    path: Path
    samples: Sequence[Sample]
    making: Making
    options: Mapping[str, Any]

    @cached_property
    def content(self) -> str:
        """A digest of all that decides the bytes: names, captions, sizes and dates of the files, and how it is made."""
        parts = [[vars(sample) for sample in self.samples], self.making.size_px, self.making.all_captions]
        return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()

    @property
    def is_whole(self) -> bool:
        """Whether it is there already, made of the same files in the same way."""
        stats = read_stats(self.path)
        return stats.get("content") == self.content and size_of(self.path) == stats["tar_bytes"]

    def write(self, threads: int, after_each: Callable[[], None]) -> None:
        """``threads`` of them read and shrink pictures, ``after_each`` is called when one is written."""
        write_atomically(self.path, partial(self.fill, threads, after_each), OTHER_FOLDER)

    def fill(self, threads: int, after_each: Callable[[], None], beside: Path) -> None:
        failed: dict[str, list[str]] = {}
        extensions: set[str] = set()
        with tarfile.open(beside, "w") as tar:
            for sample, members in self.made(threads):
                if isinstance(members, Rejected):
                    failed.setdefault(members.reason, []).append(sample.name)
                    members = {}
                for extension, data in members.items():
                    add_member(tar, f"{sample.key}.{extension}", data)
                extensions |= set(members)
                after_each()
        # before the archive gets its name, since an archive without such stats is somebody else's
        written = {"extensions": sorted(extensions), "tar_bytes": beside.stat().st_size, "content": self.content}
        text = json.dumps(self.counts(failed) | written | {"options": self.options}, indent=4) + "\n"
        write_atomically(stats_path(self.path), lambda path: path.write_text(text), OTHER_FOLDER)

    def made(self, threads: int) -> Iterator[tuple[Sample, dict[str, bytes] | Rejected]]:
        """In order, a few at once, since all would not fit into memory."""
        with ThreadPoolExecutor(threads) as pool:
            made = pool.map if threads > 1 else map
            for start in range(0, len(self.samples), 2 * threads):
                samples = self.samples[start : start + 2 * threads]
                yield from zip(samples, made(self.try_members, samples), strict=True)

    def try_members(self, sample: Sample) -> dict[str, bytes] | Rejected:
        try:
            return self.making.members(sample)
        except Rejected as reject:
            return Rejected(reject.reason, reject.detail)  # the caught one holds the frames, and so the picture

    def counts(self, failed: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """As img2dataset has them; ``failed`` is reason → names."""
        reasons = {reason: len(names) for reason, names in failed.items()}
        successes, unshrunk = len(self.samples) - sum(reasons.values()), reasons.get(NOT_SHRUNK, 0)
        return {
            "count": len(self.samples),
            "successes": successes,
            "failed_to_download": len(self.samples) - successes - unshrunk,
            "failed_to_resize": unshrunk,
            "status_dict": {"success": successes, **reasons},
            "failed": failed,
        }


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # of 1970, nobody's
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def stats_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_stats.json")


def read_stats(shard: Path) -> dict[str, Any]:
    """The stats that were written with a shard; empty when there are none, or none of this tool."""
    try:
        stats = json.loads(stats_path(shard).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return stats if isinstance(stats, dict) and {"content", "tar_bytes", "options"} <= set(stats) else {}


def size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def missing(out: Path, shards: Sequence[Shard], overwrite: bool) -> list[Shard]:
    """The shards that are not there yet.

    Others that lie in ``out`` are refused with ValueError: training would read them, too. If they are of an earlier
    packing, ``overwrite`` removes them.
    """
    lying = sorted(path for path in out.glob("*") if path.name.endswith(ENDINGS))
    foreign = [path.name for path in lying if not read_stats(path)]
    if foreign:
        raise UserError(
            f"out={out} holds shards that were not packed here, {examples(foreign)}, and training would read them, "
            f"too: {OTHER_FOLDER}"
        )
    wanted = {shard.path: shard.content for shard in shards}
    earlier = [path for path in lying if read_stats(path)["content"] != wanted.get(path)]
    if earlier and not overwrite:
        raise UserError(f"{len(earlier)} of the {len(lying)} shards in out={out} {changed(earlier, shards)}")
    for path in earlier:
        path.unlink()
        stats_path(path).unlink()
    for leftover in out.glob(".*.tmp"):  # of a packing that was killed
        with suppress(OSError):
            leftover.unlink()
    return [shard for shard in shards if not shard.is_whole]


def changed(earlier: Sequence[Path], shards: Sequence[Shard]) -> str:
    """How those of an earlier packing differ from what is asked for, and the ways out."""
    then, now = read_stats(earlier[0])["options"], shards[0].options
    differing = [f"{name}={then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]
    why = (
        f"with other options ({'; '.join(differing)})" if differing else "of other files: the folder has changed since"
    )
    return (
        f"were packed {why}. overwrite=true packs them anew, which changes what trainings see that read them; "
        "out=FOLDER leaves them as they are."
    )
