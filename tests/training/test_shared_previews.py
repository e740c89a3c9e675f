"""Weights that are shared out change nothing: neither a picture, whoever makes it, nor a loss and its gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import MODELS, compare_all_gradients, draw_pictures, make_columns, moved_model, together

from ipa.training.previews import generate_columns


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    together(draw_pictures, folder)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    path = tmp_path_factory.mktemp("measured") / "gradients.json"
    together(compare_all_gradients, path)
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["whole", "shared"])
def test_pictures_of_two_ranks_are_those_of_one(drawn: Path, weights: str) -> None:
    """To the bit; with shared weights a rank that has less to do takes part in every pass all the same."""
    model = moved_model()
    if weights == "shared":  # which only the contiguous layout can be, and each layout rounds in its own way
        model.family.to(memory_format=torch.contiguous_format)
    shared, alone = torch.load(drawn / f"{weights}.pt"), generate_columns(model, make_columns())

    assert [len(pictures) for pictures in shared] == [5, 5, 1]
    assert all(torch.equal(one, other) for one, other in zip(shared, alone, strict=True))
    assert all(pictures.is_contiguous() for pictures in shared + alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_the_same(measured: dict[str, dict[str, float]], name: str) -> None:
    """With recomputed blocks, too; nearly all of the frozen weights are shared out, the VAE's apart."""
    found = measured[name]
    assert found["loss"] == 0
    assert found["gradient"] < 1e-7 and abs(found["norm"]) < 1e-6
    assert found["shared"] > 0.6
