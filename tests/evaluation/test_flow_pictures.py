"""Evaluation of adapters for transformers: what is missing is made again to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_flow
import torch
from conftest import compose, usual

from ipa.evaluation.run import evaluate
from ipa.export.published import to_published, write_adapter


@pytest.mark.parametrize("name", ["flux", *(pytest.param(each, marks=pytest.mark.slow) for each in ("chroma", "sd3"))])
def test_what_is_missing_is_made_again_to_the_bit(name: str, prompts: Path, clip_name: str, tmp_path: Path) -> None:
    """Images of the first and of the last batch."""
    model = tiny.shake(tiny_flow.make_model(tiny_flow.MAKERS[name]))
    base = tiny_flow.save(model.family, tmp_path / "base")
    tensors = to_published(model.trainable.state_dict(), torch.float16, model.family.branches)
    adapter = tmp_path / "mine.safetensors"
    write_adapter(adapter, tensors, {**model.describe(), "base": base, "encoder": clip_name})
    overrides = [*usual(prompts, adapter, clip_name, tmp_path / "out"), "label=x"]
    evaluate(compose(*overrides))
    pictures = sorted((tmp_path / "out/x/pictures").iterdir())
    before = [path.read_bytes() for path in pictures]
    for path in (pictures[1], pictures[-1]):
        path.unlink()
    evaluate(compose(*overrides))

    assert len(before) == 10 == len(set(before))
    assert [path.read_bytes() for path in pictures] == before
