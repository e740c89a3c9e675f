"""Weights that are shared out change nothing: neither a picture, whoever makes it, nor a loss and its gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import compare_all_gradients, draw_pictures, make_columns, moved_model, together

from ipa.training.previews import generate_columns


@pytest.mark.slow
def test_pictures_of_two_ranks_are_those_of_one(tmp_path: Path) -> None:
    """To the bit; with shared weights a rank that has less to do takes part in every pass all the same."""
    together(draw_pictures, tmp_path)
    model = moved_model()
    for weights in ("whole", "shared"):
        shared, alone = torch.load(tmp_path / f"{weights}.pt"), generate_columns(model, make_columns())
        assert [len(pictures) for pictures in shared] == [5, 5, 1]
        assert all(torch.equal(one, other) for one, other in zip(shared, alone, strict=True)), weights
        assert all(pictures.is_contiguous() for pictures in shared + alone)
        # which only the contiguous layout can be, and each layout rounds in its own way
        model.family.to(memory_format=torch.contiguous_format)


@pytest.mark.slow
def test_loss_and_gradient_are_the_same(tmp_path: Path) -> None:
    """With recomputed blocks, too; nearly all of the frozen weights are shared out, the VAE's apart."""
    together(compare_all_gradients, tmp_path / "gradients.json")
    for name, found in json.loads((tmp_path / "gradients.json").read_text()).items():
        assert found["loss"] == 0, name
        assert found["gradient"] < 1e-7 and abs(found["norm"]) < 1e-6, name
        assert found["shared"] > 0.6, name
