"""Where items come from: shards, a folder of images, or COCO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ipa.data.addresses import digest
from ipa.data.images.transforms import Opened, open_picture, read_picture
from ipa.data.order.sequence import Order
from ipa.data.records import Record
from ipa.data.shards.names import TRUSTED
from ipa.data.shards.source import ShardSource
from ipa.errors import UserError
from ipa.evaluation.items import Item
from ipa.files import PICTURE_EXTENSIONS

MAX_PIXELS = 100_000_000


class ShardBenchmark:
    """The first ``limit`` good samples of WebDataset shards, in file order."""

    def __init__(
        self,
        name: str,
        shards: Any,
        limit: int | None = None,
        captions: Any = "txt",
        schemes: Sequence[str] = TRUSTED,
    ) -> None:
        self.name, self.limit = name, limit
        self.source = ShardSource.of(name, shards=shards, captions=captions, option="benchmark", schemes=schemes)

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "shards", "fingerprint": self.source.fingerprint(), "limit": self.limit}

    @cached_property
    def records(self) -> dict[str, Record]:
        slots = Order([self.source], seed=0).in_file_order()
        found: dict[str, Record] = {}
        for slot in islice(slots, self.limit):
            if found.setdefault(slot.record.key, slot.record) is not slot.record:
                raise UserError(f"benchmark={self.name}: two samples have the key {slot.record.key}")
        return found

    def items(self) -> Sequence[Item]:
        return [Item(key, tuple(text for text, _ in record.captions)) for key, record in self.records.items()]

    def read(self, item: Item) -> Tensor:
        return pixels(open_picture(self.records[item.id].picture, "white", MAX_PIXELS))


class FolderBenchmark:
    """The first ``limit`` images of a folder, by name; a ``.txt`` file of the same name has captions, one a line."""

    def __init__(self, name: str, folder: str, limit: int | None = None) -> None:
        self.name, self.folder, self.limit = name, Path(folder), limit

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "folder", "folder": str(self.folder), "limit": self.limit, "fingerprint": self.fingerprint}

    @cached_property
    def paths(self) -> dict[str, Path]:
        """By name; raises UserError for no images, or two with the same name."""
        if not self.folder.is_dir():
            raise UserError(f"benchmark.folder={self.folder}: no such folder")
        found = sorted(path for path in self.folder.iterdir() if is_picture(path))
        if not found:
            raise UserError(f"benchmark.folder={self.folder}: no images ({', '.join(PICTURE_EXTENSIONS)})")
        paths = {path.stem: path for path in found[: self.limit]}
        if len(paths) < len(found[: self.limit]):
            raise UserError(f"benchmark.folder={self.folder}: some images differ only in their extension")
        return paths

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(list(self.paths.values()))

    def items(self) -> Sequence[Item]:
        return [Item(name, read_captions(path)) for name, path in self.paths.items()]

    def read(self, item: Item) -> Tensor:
        return pixels(read_picture(self.paths[item.id], "benchmark.folder"))


class CocoBenchmark:
    """The first ``limit`` images of COCO by id with captions (Lin et al. 2014); the paper used all of val2017."""

    def __init__(self, name: str, images: str, annotations: str, limit: int | None = None) -> None:
        self.name, self.images, self.annotations, self.limit = name, Path(images), Path(annotations), limit

    @property
    def settings(self) -> dict[str, Any]:
        files = [self.images / name for name, _ in self.entries.values()]
        return {"kind": "coco", "limit": self.limit, "fingerprint": fingerprint_of(files)}

    @cached_property
    def entries(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Id → file name and captions; raises UserError."""
        if not self.annotations.is_file():
            raise UserError(
                f"benchmark.annotations={self.annotations}: no such file. COCO's captions are in "
                "annotations_trainval2017.zip, its images in val2017.zip (cocodataset.org)"
            )
        try:
            content = json.loads(self.annotations.read_bytes())
            captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
            for annotation in content["annotations"]:
                captions[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
            names = {image["id"]: image["file_name"] for image in content["images"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"benchmark.annotations={self.annotations} is not a file of captions: {error!r}") from error
        chosen = sorted(names)[: self.limit]
        return {f"{number:012d}": (names[number], tuple(captions[number])) for number in chosen}

    def items(self) -> Sequence[Item]:
        missing = [name for name, _ in self.entries.values() if not (self.images / name).is_file()]
        if missing:
            raise UserError(
                f"benchmark.images={self.images}: {len(missing)} of the {len(self.entries)} images in "
                f"{self.annotations.name} are missing ({missing[0]} …)"
            )
        return [Item(number, captions) for number, (_, captions) in self.entries.items()]

    def read(self, item: Item) -> Tensor:
        return pixels(read_picture(self.images / self.entries[item.id][0], "benchmark.images"))


def pixels(picture: Opened) -> Tensor:
    """The whole image: uint8 image_3HW."""
    return picture.pixels_3HW.contiguous()


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_EXTENSIONS and not path.name.startswith(".")  # macOS adds ._NAME files


def fingerprint_of(files: Sequence[Path]) -> str:
    """A hash of names and file sizes: it differs for a resized copy of the same images."""
    return f"{digest(*(part for path in files for part in (path.stem, path.stat().st_size))):016x}"


def read_captions(path: Path) -> tuple[str, ...]:
    """Raises UserError for a file that is not UTF-8."""
    file = path.with_suffix(".txt")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else []
    except UnicodeDecodeError as error:
        raise UserError(f"benchmark.folder: {file} is not UTF-8 ({error.reason} at byte {error.start})") from error
    return tuple(line.strip() for line in lines if line.strip())
