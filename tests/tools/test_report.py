"""`python -m ipa.tools.report`: the command, its options, the errors for wrong ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ipa.tools.report import main


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """One item, one skipped system."""
    items = [{"id": "a", "captions": ["a thing"], "reference": "references/a.png"}]
    manifest = {"label": "seecoder", "method": {"name": "seecoder"}, "status": "skipped", "reason": "download it"}
    (tmp_path / "demo" / "seecoder").mkdir(parents=True)
    content = {"benchmark": {"name": "demo", "settings": {}}, "num_seeds": 1, "items": items}
    (tmp_path / "demo" / "items.json").write_text(json.dumps(content))
    (tmp_path / "demo" / "seecoder" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "demo"


@pytest.mark.parametrize("argument", ["{}", "folder={}"])
def test_a_folder_is_enough(evaluation: Path, argument: str, command: Callable[..., str]) -> None:
    assert command(main, argument.format(evaluation), rows=3, seed=1) == f"wrote {evaluation / 'report.html'}\n"
    assert "skipped: download it" in (evaluation / "table.md").read_text()
    assert not (evaluation / "wandb").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [(each, f"tool: {each}") for each in ("rows=-1", "best=-1", "thumbnail_px=2", "system=mine")]
    + [("sytem=mine", "Did you mean system="), ("rows=many", "rows=many"), ("folder=/nowhere", "folder")],
)
def test_mistakes_end_with_a_message(
    evaluation: Path, argument: str, message: str, command: Callable[..., str]
) -> None:
    arguments = [argument] if argument.startswith("folder") else [str(evaluation), argument]
    with pytest.raises(SystemExit, match=message):
        command(main, *arguments)
    assert not (evaluation / "table.md").exists()
