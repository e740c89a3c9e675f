"""Items, each an image prompt with captions, and the plan of images to make from each.

Items come from *benchmarks*: ``ShardBenchmark`` (the demo world, or any shards), ``FolderBenchmark``, ``CocoBenchmark``
(the paper's: 5,000 images of COCO val2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

from torch import Tensor

from ipa.data.addresses import digest
from ipa.errors import UserError

PROMPTS = ("empty", "caption")


@dataclass(frozen=True)
class Item:
    """The id of an image prompt, and its captions; the first one is used as text."""

    id: str
    captions: tuple[str, ...]


class Benchmark(Protocol):
    """Items in a fixed order. ``settings`` say how they were chosen; their ``fingerprint`` changes with any item."""

    name: str

    @property
    def settings(self) -> dict[str, Any]: ...

    def items(self) -> Sequence[Item]:
        """Raises UserError, also when there are none."""
        ...

    def read(self, item: Item) -> Tensor:
        """The whole image, upright, RGB: uint8 image_3HW."""
        ...


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
    if prompt == "caption" and (without := [item.id for item in items if not item.captions]):
        raise UserError(f"prompt=caption, but {len(without)} items have no caption ({without[0]} …): give prompt=empty")
    return [
        Task(item, number, seed_of(seed, item, number), item.captions[0] if prompt == "caption" else "")
        for item in items
        for number in range(num_seeds)
    ]


def names_a_file(name: str) -> bool:
    """Whether ``name`` with an extension is a file inside a folder: a tar archive can give its samples any name."""
    return bool(name) and "\0" not in name and not {"/", "..", "."} & set(PurePosixPath(name).parts)


def seed_of(seed: int, item: Item, number: int) -> int:
    return digest("evaluation", seed, item.id, number) % 2**31
