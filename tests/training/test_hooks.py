"""Callbacks run in their declared order, whatever their order in the configuration."""

import random
from itertools import pairwise
from pathlib import Path

import lightning as L
from conftest import World, compose
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from ipa.training.hooks import in_order
from ipa.training.run import own_metadata

RELATIONS = [  # what comes first, what comes after it
    ("DataPosition", "Checkpoints"),
    ("FiniteGuard", "ExportAdapter"),
    ("FiniteGuard", "TimestepBuckets"),
    ("Throughput", "Checkpoints"),
    ("ExportAdapter", "Checkpoints"),
    ("Checkpoints", "Previews"),
    ("Foreign", "ExportAdapter"),
]


class Foreign(L.Callback):
    """A callback of the user."""


def test_the_order_of_the_configuration_does_not_matter(tmp_path: Path, world: World) -> None:
    callbacks = [*instantiate(compose(tmp_path, *world.overrides(), "judge=null").callbacks).values(), Foreign()]
    GlobalHydra.instance().clear()
    for seed in range(20):
        random.Random(seed).shuffle(callbacks)
        names = [type(callback).__name__ for callback in in_order(callbacks)]
        for first, second in RELATIONS:
            assert names.index(first) < names.index(second)
    assert all(one is not other for one, other in pairwise(in_order(callbacks)))


def test_a_licence_is_text(tmp_path: Path) -> None:
    for licence, text in (("MIT", "MIT"), ("4.0", "4.0"), ("[MIT,CC0-1.0]", "['MIT', 'CC0-1.0']")):
        assert own_metadata(compose(tmp_path, f"licence={licence}"))["licence"] == text
