"""Where the judge runs."""

from __future__ import annotations

import pytest
import tiny
import torch

from ipa.metrics.clip import ClipScorer
from ipa.training.previews import HeldOutPrompts, score_pictures
from ipa.types import to_unit_range


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
