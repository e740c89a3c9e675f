"""Benchmark items, each an image prompt with captions, and the plan of images to make from them.

A benchmark has a ``name``, ``settings`` that say how its items were chosen (their ``fingerprint`` changes with any
item), the ``items()`` in a fixed order, and ``read(item)``: the whole image, upright, RGB, uint8 image_3HW. All of them
raise UserError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from torch import Tensor

from ipa.data.addresses import digest
from ipa.data.images.transforms import open_picture, read_picture
from ipa.data.order.sequence import Order
from ipa.data.records import Record
from ipa.data.rejects import Rejected
from ipa.data.shards.names import TRUSTED
from ipa.data.shards.source import ShardSource
from ipa.errors import UserError
from ipa.files import pictures_in, read_json, read_text

MAX_PIXELS = 100_000_000
PROMPTS = ("empty", "caption")


@dataclass(frozen=True)
class Item:
    """The id of an image prompt, and its captions; the first one is used as text."""

    id: str
    captions: tuple[str, ...]


class ShardBenchmark:
    """The first ``limit`` good samples of WebDataset shards, in file order."""

    def __init__(
        self, name: str, shards: Any, limit: int | None = None, captions: Any = "txt", schemes: Sequence[str] = TRUSTED
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
        try:
            return open_picture(self.records[item.id].picture, "white", MAX_PIXELS).pixels_3HW.contiguous()
        except Rejected as error:
            raise UserError(f"benchmark={self.name}: sample {item.id} cannot be read as a picture: {error}") from error


class FileBenchmark:
    """The first ``limit`` images of ``folder``, given as ``option``. Subclasses find their paths and captions by id."""

    kind: ClassVar[str]
    option: ClassVar[str]
    entries: Mapping[str, tuple[Path, tuple[str, ...]]]

    def __init__(self, name: str, folder: str, limit: int | None = None) -> None:
        self.name, self.folder, self.limit = name, Path(str(folder)), limit

    @property
    def settings(self) -> dict[str, Any]:
        paths = [path for path, _ in self.entries.values()]
        # differs for a resized copy of the same images
        fingerprint = f"{digest(*(part for path in paths for part in (path.stem, path.stat().st_size))):016x}"
        return {"kind": self.kind, "folder": str(self.folder), "limit": self.limit, "fingerprint": fingerprint}

    def items(self) -> Sequence[Item]:
        return [Item(id, captions) for id, (_, captions) in self.entries.items()]

    def read(self, item: Item) -> Tensor:
        return read_picture(self.entries[item.id][0], self.option).pixels_3HW.contiguous()


class FolderBenchmark(FileBenchmark):
    """Images by name; a ``.txt`` file of the same name has captions, one a line."""

    kind, option = "folder", "benchmark.folder"

    @cached_property
    def entries(self) -> dict[str, tuple[Path, tuple[str, ...]]]:  # type: ignore[override]
        """Raises UserError for no images, two with the same name, or captions that are not UTF-8."""
        found = pictures_in(self.folder, self.option)[: self.limit]
        if len({path.stem for path in found}) < len(found):
            raise UserError(f"{self.option}={self.folder}: some images differ only in their extension")
        return {path.stem: (path, self.captions_of(path)) for path in found}

    @staticmethod
    def captions_of(path: Path) -> tuple[str, ...]:
        file = path.with_suffix(".txt")
        lines = read_text(file).splitlines() if file.is_file() else []
        return tuple(line.strip() for line in lines if line.strip())


class CocoBenchmark(FileBenchmark):
    """Images of COCO by id with captions (Lin et al. 2014); the paper used all of val2017."""

    kind, option = "coco", "benchmark.images"

    def __init__(self, name: str, images: str, annotations: str, limit: int | None = None) -> None:
        super().__init__(name, images, limit)
        self.annotations = Path(annotations)

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().settings.items() if name != "folder"}  # copies are the same

    @cached_property
    def entries(self) -> dict[str, tuple[Path, tuple[str, ...]]]:  # type: ignore[override]
        """Raises UserError for a file of something else, or images that are missing."""
        if not self.annotations.is_file():
            raise UserError(
                f"benchmark.annotations={self.annotations}: no such file. COCO's captions are in "
                "annotations_trainval2017.zip, its images in val2017.zip (cocodataset.org)"
            )
        try:
            content = read_json(self.annotations, "give COCO's captions_val2017.json")
            captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
            for annotation in content["annotations"]:
                captions[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
            files = {image["id"]: self.folder / image["file_name"] for image in content["images"]}
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"benchmark.annotations={self.annotations} is not a file of captions: {error!r}") from error
        entries = {f"{id:012d}": (files[id], tuple(captions[id])) for id in sorted(files)[: self.limit]}
        if missing := [path.name for path, _ in entries.values() if not path.is_file()]:
            raise UserError(
                f"benchmark.images={self.folder}: {len(missing)} of the {len(entries)} images in "
                f"{self.annotations.name} are missing ({missing[0]} …)"
            )
        return entries


Benchmark = ShardBenchmark | FileBenchmark


@dataclass(frozen=True)
class Task:
    """One image to make, the ``number``-th of an item."""

    item: Item
    number: int
    seed: int
    text: str

    @property
    def file(self) -> str:
        return f"pictures/{self.item.id}_{self.number}.png"


def plan(items: Sequence[Item], num_seeds: int, seed: int, prompt: str) -> list[Task]:
    """All images in order. An image's seed only depends on ``seed``, its item's id and its number.

    ``prompt`` is one of ``PROMPTS``: the text is empty, or the item's first caption. Raises UserError.
    """
    assert prompt in PROMPTS and num_seeds >= 1, f"prompt={prompt} num_seeds={num_seeds}"
    if strange := [item.id for item in items if not names_a_file(item.id)]:
        raise UserError(f"{len(strange)} items have ids that cannot name files ({strange[0]!r} …)")
    captioned = prompt == "caption"
    if captioned and (without := [item.id for item in items if not item.captions]):
        raise UserError(f"prompt=caption, but {len(without)} items have no caption ({without[0]} …): give prompt=empty")
    return [
        Task(item, number, digest("evaluation", seed, item.id, number) % 2**31, item.captions[0] if captioned else "")
        for item in items
        for number in range(num_seeds)
    ]


def names_a_file(name: str) -> bool:
    """Whether ``name`` with an extension is a file inside a folder: a tar archive can give its samples any name."""
    return bool(name) and "\0" not in name and not {"/", "..", "."} & set(PurePosixPath(name).parts)
