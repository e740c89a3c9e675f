"""Read back what wandb wrote offline, ``wandb/offline-run-<time>-<id>/run-<id>.wandb``; wandb itself only uploads it.

The file is a header of 7 bytes and a LevelDB log (``doc/log_format.md`` of google/leveldb): blocks of 32 KiB, counted
from the start of the file, hold pieces ``checksum u32 | length u16 | kind u8 | data``, little-endian. A record is one
FULL piece, or FIRST, MIDDLE …, LAST; fewer than 7 bytes at a block's end are padding. Unlike LevelDB's, the checksum is
the CRC-32 of zip, unmasked, over kind and data. A record is a protobuf, ``wandb.proto.wandb_internal_pb2.Record``.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
PIECE = struct.Struct("<IHB")
BLOCK_BYTES = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
# Lightning logs the step under this name; wandb's own "_step" only counts the calls
STEP = "trainer/global_step"


@dataclass
class WandbRun:
    """One offline run. Resuming with the same ``id=`` makes another one, with the same ``id``."""

    id: str
    files: Path
    name: str = ""
    group: str = ""
    project: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    started_s: float = 0.0
    finished: bool = False

    def curve(self, name: str) -> dict[int, float]:
        """Training step → number. Raises ``ValueError`` where the name was not logged, or not as a number."""
        return {step: float(value) for step, value in self._logged(name, "int", "float")}

    def images(self, name: str) -> dict[int, list[Path]]:
        """Training step → files of a picture or a list of pictures; raises ``OSError`` where a file is missing."""
        logged = self._logged(name, "image-file", "images/separated")
        return {
            step: [self._file(path) for path in value.get("filenames") or [value["path"]]] for step, value in logged
        }

    def table(self, name: str) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the table logged last; a picture in a cell is a dictionary with its ``path``."""
        *_, (_, value) = self._logged(name, "table-file")
        content = json.loads(self._file(value["path"]).read_text())
        return content["columns"], content["data"]

    def _logged(self, name: str, *kinds: str) -> list[tuple[int, Any]]:
        values = [(row.get(STEP, row["_step"]), row[name]) for row in self.history if name in row]
        if not values:
            names = sorted({key for row in self.history for key in row})
            raise ValueError(f"run {self.id} logged no {name!r}; logged were {', '.join(names) or 'no values at all'}")
        for step, value in values:
            if kind_of(value) not in kinds:
                found = f"{name!r} of kind {kind_of(value)} at step {step}"
                raise ValueError(f"run {self.id} logged {found}, where {' or '.join(kinds)} was asked for")
        return values

    def _file(self, path: str) -> Path:
        if not (self.files / path).is_file():
            raise OSError(f"run {self.id} logged the file {path}, which is not in {self.files}")
        return self.files / path

    def _read(self, record: pb.Record) -> None:
        match record.WhichOneof("record_type"):
            case "run":
                self._describe(record.run)
            case "config":
                change(self.config, record.config)
            case "summary":
                change(self.summary, record.summary)
            case "history":
                self.history.append(nested(record.history.item))
            case "exit":
                self.finished = True

    def _describe(self, run: pb.RunRecord) -> None:
        self.id, self.project, self.group = run.run_id, run.project, run.run_group
        self.name, self.job_type, self.tags = run.display_name, run.job_type, list(run.tags)
        self.started_s = run.start_time.seconds + run.start_time.nanos * 1e-9
        change(self.config, run.config)


def read_offline_runs(folder: Path) -> list[WandbRun]:
    """All runs under ``folder/wandb``, the oldest first.

    Of a run that was killed, what had reached the file is read: wandb writes there every 15 s, and a run killed sooner
    has an ``id`` and nothing else. Raises ``ValueError`` for a file that is damaged rather than cut short.
    """
    runs = [read_run(path) for path in folder.glob("wandb/offline-run-*/run-*.wandb")]
    return sorted(runs, key=lambda run: (run.started_s, run.id))


def read_run(path: Path) -> WandbRun:
    run = WandbRun(id=path.stem.removeprefix("run-"), files=path.parent / "files")
    for data in records(path):
        run._read(pb.Record.FromString(data))
    for values in (run.config, run.summary):
        values.pop("_wandb", None)  # wandb's notes on itself
    return run


def records(path: Path) -> Iterator[bytes]:
    """The records of a log, joined from their pieces; one whose end is missing is left out."""
    parts: list[bytes] = []
    for at, kind, data in pieces(path):
        if (kind in (MIDDLE, LAST)) != bool(parts):
            raise ValueError(f"{path} is damaged: at byte {at} a record begins inside another, or goes on without one")
        parts.append(data)
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


def pieces(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(place, kind, data) of every whole piece."""
    content = path.read_bytes()
    if not HEADER.startswith(content[: len(HEADER)]):
        raise ValueError(
            f"{path} is no record file of wandb: it begins with {content[: len(HEADER)]!r}, not {HEADER!r}"
        )
    at = len(HEADER)
    while at + PIECE.size <= len(content):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < PIECE.size:
            at += left
            continue
        checksum, length, kind = PIECE.unpack_from(content, at)
        data = content[at + PIECE.size : at + PIECE.size + length]
        if length > left - PIECE.size or kind not in (FULL, FIRST, MIDDLE, LAST):
            raise ValueError(f"{path} is damaged: at byte {at} stands a piece of kind {kind} with {length} bytes")
        if len(data) < length:
            return
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"{path} is damaged: the checksum of the piece at byte {at} does not fit")
        yield at, kind, data
        at += PIECE.size + length


def kind_of(value: Any) -> str:
    """Of files wandb's own word, of other values the type."""
    kind = type(value).__name__
    return value.get("_type", kind) if isinstance(value, dict) else kind


def nested(items: Any) -> dict[str, Any]:
    """Values as they were logged: wandb stores the leaves of a dictionary one by one, with the path to each."""
    values: dict[str, Any] = {}
    for item in items:
        put(values, item)
    return values


def change(values: dict[str, Any], changes: pb.ConfigRecord | pb.SummaryRecord) -> None:
    for item in changes.update:
        put(values, item)
    for item in changes.remove:
        *parents, last = item.nested_key or [item.key]
        inside = values
        for key in parents:
            inside = inside.get(key, {})
        inside.pop(last, None)


def put(values: dict[str, Any], item: Any) -> None:
    *parents, last = item.nested_key or [item.key]
    for key in parents:
        values = values.setdefault(key, {})
    values[last] = json.loads(item.value_json)
