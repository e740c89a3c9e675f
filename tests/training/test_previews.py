"""Previews of the user's own pictures, with captions and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run, column, picture
from PIL import Image

from ipa.data.images.transforms import fit_reference, read_picture
from ipa.training.previews import HeldOutPrompts

NAMES = ("b", "a", "d", "c")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four pictures and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        (folder / f"{name}.PNG").write_bytes(picture(seed))
    (folder / "notes.md").write_text("not a picture")
    return folder


@pytest.mark.parametrize("captioned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_previews_and_scores_of_a_folder_in_place_of_the_held_out_shards(
    train_in: Run, tmp_path: Path, pictures: Path, captioned: bool
) -> None:
    if captioned:
        (pictures / "a.txt").write_text("red thing\n")
    few = ("trainer.max_steps=2", "preview.num_prompts=9")
    folder = train_in(tmp_path / "x", f"preview.images={pictures}", *few)
    scores = json.loads((folder / "summary.json").read_text())["scores"]["scale 1"]

    with Image.open(folder / "previews/step_000002.png") as grid:
        assert grid.height == 4 * 100 + 4 + 18
    assert list(column(folder, "preview/clip_i")) == [2]
    assert list(column(folder, "preview/clip_t")) == ([2] if captioned else [])
    assert ("clip_t" in scores) == captioned


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_pictures_of_a_folder_come_by_name_with_their_captions_and_cut_as_in_training(pictures: Path, fit: str) -> None:
    (pictures / "a.txt").write_text("red thing\n")
    prompts = HeldOutPrompts.from_folder(pictures, 16, 24, fit)
    by_name = [pictures / f"{name}.PNG" for name in sorted(NAMES)]
    references = [fit_reference(read_picture(path), 24, fit) for path in by_name]

    assert prompts.captions == ["red thing", "", "", ""] and prompts.images_B3HW.shape == (4, 3, 16, 16)
    corners = [tuple(image[:, 0, 0].tolist()) for image in prompts.images_B3HW]
    assert corners == [Image.open(path).convert("RGB").getpixel((0, 4)) for path in by_name]
    assert torch.equal(prompts.references_B3HW, torch.stack(references))
