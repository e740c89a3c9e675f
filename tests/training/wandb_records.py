"""Read what wandb wrote offline, ``wandb/offline-run-<time>-<id>/run-<id>.wandb``; wandb itself only uploads it.

The file is a header of 7 bytes and a LevelDB log (``doc/log_format.md`` of google/leveldb): blocks of 32 KiB, counted
from the start of the file, hold pieces ``checksum u32 | length u16 | kind u8 | data``, little-endian. A record is one
FULL piece, or FIRST, MIDDLE …, LAST; fewer than 7 bytes at a block's end are padding. The checksum is the CRC-32 of
zip over kind and data. A record is a protobuf, ``wandb.proto.wandb_internal_pb2.Record``.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2 as pb

HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
PIECE = struct.Struct("<IHB")
BLOCK_BYTES = 32 * 1024
FULL, LAST = 1, 4  # kinds that end a record
STEP = "trainer/global_step"  # Lightning's name of the step; wandb's own "_step" counts the calls


HOME_OF_WANDB = (
    *("WANDB_API_KEY", "WANDB_MODE", "NETRC"),
    *("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME"),
)


@contextmanager
def logged_out(home: Path) -> Iterator[pytest.MonkeyPatch]:
    """The environment of a user with this empty home folder; at the end everything is written."""
    with pytest.MonkeyPatch.context() as patch:
        for name in HOME_OF_WANDB:
            patch.setenv(name, "")  # so that it is restored even if it was not set
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        yield patch
        wandb.teardown()


@dataclass
class WandbRun:
    """One offline run. A resumed run is another one, with the same ``id``."""

    id: str
    files: Path
    name: str = ""
    group: str = ""
    project: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    started_s: float = 0.0
    finished: bool = False

    def curve(self, name: str) -> dict[int, float]:
        """Training step → number."""
        return {step: float(value) for step, value in self._logged(name)}

    def images(self, name: str) -> dict[int, list[Path]]:
        """Training step → files of an image or a list of images."""
        return {
            step: [self._file(path) for path in value.get("filenames") or [value["path"]]]
            for step, value in self._logged(name)
        }

    def table(self, name: str) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the table that was logged last."""
        *_, (_, value) = self._logged(name)
        content = json.loads(self._file(value["path"]).read_text())
        return content["columns"], content["data"]

    def _logged(self, name: str) -> list[tuple[int, Any]]:
        return [(row.get(STEP, row["_step"]), row[name]) for row in self.history if name in row]

    def _file(self, path: str) -> Path:
        assert (self.files / path).is_file(), f"run {self.id} logged the file {path}, which is not in {self.files}"
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
                self.history.append({})
                for item in record.history.item:
                    put(self.history[-1], item)
            case "exit":
                self.finished = True

    def _describe(self, run: pb.RunRecord) -> None:
        self.id, self.project, self.group = run.run_id, run.project, run.run_group
        self.name, self.job_type = run.display_name, run.job_type
        self.started_s = run.start_time.seconds + run.start_time.nanos * 1e-9
        change(self.config, run.config)


def read_offline_runs(folder: Path) -> list[WandbRun]:
    """All runs under ``folder/wandb``, the oldest first; of a killed run, what reached the file."""
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
    """The whole records of a file."""
    record = b""
    for kind, data in pieces(path.read_bytes()):
        record += data
        if kind in (FULL, LAST):
            yield record
            record = b""


def pieces(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, data) of every whole piece."""
    assert HEADER.startswith(content[: len(HEADER)])
    at = len(HEADER)
    while at + PIECE.size <= len(content):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < PIECE.size:
            at += left
            continue
        checksum, length, kind = PIECE.unpack_from(content, at)
        data = content[at + PIECE.size : at + PIECE.size + length]
        if len(data) < length:
            return
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == checksum
        yield kind, data
        at += PIECE.size + length


def change(values: dict[str, Any], changes: pb.ConfigRecord | pb.SummaryRecord) -> None:
    for item in changes.update:
        put(values, item)


def put(values: dict[str, Any], item: Any) -> None:
    """wandb stores the leaves of a dictionary one by one, with the path to each."""
    *parents, last = item.nested_key or [item.key]
    for key in parents:
        values = values.setdefault(key, {})
    values[last] = json.loads(item.value_json)
