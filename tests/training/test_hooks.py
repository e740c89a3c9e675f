"""Callbacks run in their declared order, whatever their order in the configuration."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
from conftest import World, compose
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from ipa.errors import UserError
from ipa.training.callbacks import ExportAdapter
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


def test_an_adapter_is_not_written_as_integers() -> None:
    with pytest.raises(UserError, match=r"callbacks\.export\.dtype=int8: give float32"):
        ExportAdapter("adapter.safetensors", every_n_steps=0, dtype="int8")


@pytest.mark.parametrize("licence", ["MIT", "4.0", "[MIT,CC0-1.0]"])
def test_a_licence_is_text(tmp_path: Path, licence: str) -> None:
    metadata = own_metadata(compose(tmp_path, f"licence={licence}"))

    assert isinstance(metadata["licence"], str) and licence[1:3] in metadata["licence"]
