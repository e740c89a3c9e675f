"""`python -m ipa.tools.report`: the command, its options, the errors for wrong ones."""

import json
import sys
from pathlib import Path

import pytest

from ipa.tools.report import main


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """One item, one system that was skipped."""
    folder = tmp_path / "demo"
    (folder / "seecoder").mkdir(parents=True)
    items = [{"id": "a", "captions": ["a thing"], "reference": "references/a.png"}]
    (folder / "items.json").write_text(json.dumps({"benchmark": {"name": "demo"}, "num_seeds": 1, "items": items}))
    manifest = {"label": "seecoder", "method": {"name": "seecoder"}, "status": "skipped", "reason": "download it"}
    (folder / "seecoder" / "manifest.json").write_text(json.dumps(manifest))
    return folder


def report(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *words])
    main()


@pytest.mark.parametrize("word", ["{}", "folder={}"])
def test_a_folder_is_enough(
    evaluation: Path, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report(monkeypatch, word.format(evaluation), "rows=3", "seed=1")

    assert capsys.readouterr().out == f"wrote {evaluation / 'report.html'}\n"
    assert "skipped: download it" in (evaluation / "table.md").read_text()
    assert json.loads((evaluation / "results.json").read_text())["systems"][0]["reason"] == "download it"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rows=-1", "report: rows=-1"),
        ("thumbnail_px=2", "report: thumbnail_px=2"),
        ("system=mine", "report: system=mine"),
        ("sytem=mine", "Did you mean system="),
        ("rows=many", "rows=many"),
    ],
)
def test_mistakes_end_with_a_message(
    evaluation: Path, word: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        report(monkeypatch, str(evaluation), word)
    assert not (evaluation / "table.md").exists()


def test_an_empty_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"report: folder=.*items\.json is missing"):
        report(monkeypatch, str(tmp_path))
