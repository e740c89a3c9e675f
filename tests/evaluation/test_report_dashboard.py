"""`python -m ipa.tools.report FOLDER wandb=PROJECT`: the tables and images that are logged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import pytest
from PIL import Image
from report_folder import write_demo
from wandb.proto import wandb_internal_pb2 as pb

from ipa.evaluation.report.files import picture_rows, score_rows
from ipa.evaluation.report.page import Shown
from ipa.evaluation.report.reading import read_evaluation
from ipa.evaluation.report.table import make_table
from ipa.tools.report import main

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from wandb_records import logged_out, read_offline_runs, records


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was reported by a user who is not logged in; only to be read."""
    folder = write_demo(tmp_path_factory.mktemp("evaluation") / "demo")
    with logged_out(tmp_path_factory.mktemp("home")) as patch:
        patch.setattr(sys, "argv", ["report", str(folder), "wandb=mine", "rows=3", "thumbnail_px=16"])
        main()
    return folder


def test_a_folder_is_one_run_of_its_name_with_the_tables_scores(evaluation: Path) -> None:
    """Its id follows from the folder, so that a second report updates the run."""
    [run] = read_offline_runs(evaluation)
    assert (run.name, run.project, run.job_type) == ("demo", "mine", "evaluation")
    assert run.id == uuid5(NAMESPACE_URL, evaluation.resolve().as_uri()).hex and run.finished
    assert run.config["benchmark"]["name"] == "demo"
    columns, rows = run.table("scores")
    assert (columns, rows) == score_rows(make_table(read_evaluation(evaluation)))

    found = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["run"] for row in found] == ["sd_unclip", "style", "mine-0", "mine-0.5", "mine-1.0"]
    assert [row["CLIP-I ↑"] for row in found] == [None, None, 0, 0.125, 0.25]
    assert found[-1]["CLIP-I ↑ interval"] == "[0.240, 0.260]"
    assert found[0]["note"].startswith("skipped: download it") and found[-1]["note"] == ""


def table_files(folder: Path, name: str) -> dict[str, Path]:
    """Files of the artifact as which wandb uploads a table with images."""
    [path, *_] = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    artifacts = [record.artifact for record in map(pb.Record.FromString, records(path)) if record.HasField("artifact")]
    [found] = [artifact for artifact in artifacts if artifact.name.endswith(f"-{name}")]
    return {entry.path: Path(entry.local_path) for entry in found.manifest.contents}


def test_pictures_are_those_of_the_grid(evaluation: Path) -> None:
    files = table_files(evaluation, "pictures")
    content = json.loads(files["pictures.table.json"].read_text())
    columns, rows = content["columns"], content["data"]

    assert columns == ["item", "caption", "image prompt", "style", "mine-0", "mine-0.5", "mine-1.0"]
    shown = Shown(rows=3, thumbnail_px=16)
    assert [row[0] for row in rows] == [row[0] for row in picture_rows(read_evaluation(evaluation), shown)[1]]
    assert len(rows) == 3 and rows[0][1] == f"<{rows[0][0]}> & more"
    for item, _, prompt, style, *others in rows:
        assert (style is None) == (item != "item0")  # it is not finished
        for cell in (prompt, *others):
            assert Image.open(files[cell["path"]]).size == (16, 11)
