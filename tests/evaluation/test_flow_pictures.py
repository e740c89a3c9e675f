"""Evaluation of adapters for transformers: what is missing is made again to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import compose, make_flow_adapter, usual

from ipa.evaluation.run import evaluate


@pytest.mark.parametrize("name", ["flux", *(pytest.param(each, marks=pytest.mark.slow) for each in ("chroma", "sd3"))])
def test_what_is_missing_is_made_again_to_the_bit(name: str, prompts: Path, clip_name: str, tmp_path: Path) -> None:
    """Images of the first and of the last batch."""
    adapter = make_flow_adapter(name, clip_name, tmp_path)
    overrides = [*usual(prompts, adapter, clip_name, tmp_path / "out"), "label=x"]
    evaluate(compose(*overrides))
    pictures = sorted((tmp_path / "out/x/pictures").iterdir())
    before = [path.read_bytes() for path in pictures]
    for path in (pictures[1], pictures[-1]):
        path.unlink()
    evaluate(compose(*overrides))

    assert len(before) == 10 == len(set(before))
    assert [path.read_bytes() for path in pictures] == before
