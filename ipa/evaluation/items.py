"""What is asked of every system: items, each an image prompt with captions, and the pictures to make of each.

Sources of items are *benchmarks*, one class each: ``ShardBenchmark`` (the demo world, or any shards),
``FolderBenchmark``, ``CocoBenchmark`` (the paper's: 5,000 pictures of COCO val2017).
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
    """An image prompt by its id, with the captions that are known of it; the first is the one that is asked for."""

    id: str
    captions: tuple[str, ...]


class Benchmark(Protocol):
    """Items in a fixed order. ``settings`` tell how they were chosen; ``fingerprint`` changes with any of them."""

    name: str

    @property
    def settings(self) -> dict[str, Any]: ...

    def items(self) -> Sequence[Item]:
        """Raises UserError with a message for the user, also when there is none."""
        ...

    def read(self, item: Item) -> Tensor:
        """The whole picture, upright, RGB: uint8 image_3HW."""
        ...


@dataclass(frozen=True)
class Task:
    """One picture to make: the ``number``-th of an item."""

    item: Item
    number: int
    seed: int
    text: str

    @property
    def file(self) -> str:
        return f"pictures/{self.item.id}_{self.number}.png"


def plan(items: Sequence[Item], num_seeds: int, seed: int, prompt: str) -> list[Task]:
    """All pictures in order. A picture's seed depends on ``seed``, its item's id and its number alone.

    ``prompt`` says what text the systems get: empty, or the item's first caption. Raises UserError.
    """
    if prompt not in PROMPTS:
        raise UserError(f"prompt={prompt}: one of {', '.join(PROMPTS)}")
    if num_seeds < 1:
        raise UserError(f"num_seeds={num_seeds}: at least 1")
    if strange := [item.id for item in items if not names_a_file(item.id)]:
        raise UserError(f"{len(strange)} items have ids that cannot name files ({strange[0]!r} …)")
    if prompt == "caption" and (without := [item.id for item in items if not item.captions]):
        raise UserError(f"prompt=caption, but {len(without)} items have none ({without[0]} …): say prompt=empty")
    return [
        Task(item, number, seed_of(seed, item, number), item.captions[0] if prompt == "caption" else "")
        for item in items
        for number in range(num_seeds)
    ]


def names_a_file(name: str) -> bool:
    """Whether ``name`` with an ending is a file below a folder, whatever a tar archive calls its samples."""
    return bool(name) and "\0" not in name and not {"/", "..", "."} & set(PurePosixPath(name).parts)


def seed_of(seed: int, item: Item, number: int) -> int:
    return digest("evaluation", seed, item.id, number) % 2**31
