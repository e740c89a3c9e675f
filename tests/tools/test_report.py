"""`python -m ipa.tools.report`: the command, its options, the errors for wrong ones."""

import json
import sys
from pathlib import Path

import pytest

from ipa.tools.report import main


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """One item, one skipped system."""
    items = [{"id": "a", "captions": ["a thing"], "reference": "references/a.png"}]
    manifest = {"label": "seecoder", "method": {"name": "seecoder"}, "status": "skipped", "reason": "download it"}
    (tmp_path / "demo" / "seecoder").mkdir(parents=True)
    content = {"benchmark": {"name": "demo"}, "num_seeds": 1, "items": items}
    (tmp_path / "demo" / "items.json").write_text(json.dumps(content))
    (tmp_path / "demo" / "seecoder" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "demo"


def report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    main()


@pytest.mark.parametrize("argument", ["{}", "folder={}"])
def test_a_folder_is_enough(
    evaluation: Path, argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report(monkeypatch, argument.format(evaluation), "rows=3", "seed=1")

    assert capsys.readouterr().out == f"wrote {evaluation / 'report.html'}\n"
    assert "skipped: download it" in (evaluation / "table.md").read_text()
    assert not (evaluation / "wandb").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [(each, f"report: {each}") for each in ("rows=-1", "best=-1", "thumbnail_px=2", "system=mine")]
    + [("sytem=mine", "Did you mean system="), ("rows=many", "rows=many"), ("folder=/nowhere", "folder")],
)
def test_mistakes_end_with_a_message(
    evaluation: Path, argument: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [argument] if argument.startswith("folder") else [str(evaluation), argument]
    with pytest.raises(SystemExit, match=message):
        report(monkeypatch, *arguments)
    assert not (evaluation / "table.md").exists()
