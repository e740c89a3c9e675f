"""Previews of the user's own pictures, with captions and without; where the judge runs that scores them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from conftest import Run, column, picture
from PIL import Image

from ipa.data.images.transforms import fit_reference, read_picture
from ipa.metrics.clip import ClipScorer
from ipa.training.previews import HeldOutPrompts, score_pictures
from ipa.types import to_unit_range

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


def test_the_judge_scores_on_the_models_device_and_goes_back_to_the_cpu(
    clip_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an error. No other device is here, so the moves are recorded in place of being made."""
    scorer, done = ClipScorer.from_pretrained(clip_name), []
    prompts = HeldOutPrompts(tiny.make_pictures(2, 20), tiny.make_pictures(2, 16), ["cat", "dog"])
    pixels_B3HW = to_unit_range(tiny.make_pictures(2, 16))
    expected = score_pictures(scorer, prompts, pixels_B3HW, "cpu")

    def move(device: object) -> ClipScorer:
        done.append(str(device))
        return scorer

    embed_images = scorer.embed_images
    monkeypatch.setattr(scorer, "to", move)
    monkeypatch.setattr(scorer, "embed_images", lambda *given: done.append("embedded") or embed_images(*given))
    assert score_pictures(scorer, prompts, pixels_B3HW, torch.device("cuda:1")) == expected
    assert done == ["cuda:1", "embedded", "embedded", "cpu"]
    with pytest.raises(InterruptedError), scorer.on("cuda:1"):
        raise InterruptedError
    assert done[-2:] == ["cuda:1", "cpu"]
