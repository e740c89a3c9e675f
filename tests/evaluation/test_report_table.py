"""The table: Table 1's columns, intervals, missing values and reasons, the paper's values where they are comparable."""

from pathlib import Path
from typing import Any

import pytest
from report_folder import scored, write_demo, write_items, write_run, write_skipped

from ipa.evaluation.report.names import KINDS, kind_of, paper_row
from ipa.evaluation.report.page import render
from ipa.evaluation.report.reading import Evaluation, read_evaluation
from ipa.evaluation.report.table import make_table, paper_values

ROOT = Path(__file__).resolve().parents[2]


def rows_of(evaluation: Evaluation) -> dict[str, dict[str, str]]:
    """Label → column → text, of the table in markdown."""
    text = render("table.md.jinja", evaluation, make_table(evaluation))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|")] for line in lines]
    return {row[rows[0].index("run")]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_values_have_intervals_and_gaps_have_reasons(tmp_path: Path) -> None:
    rows = rows_of(read_evaluation(write_demo(tmp_path)))

    assert rows["mine-0.5"]["CLIP-I ↑"] == "0.125 [0.115, 0.135]"
    best = rows["mine-1.0"]
    assert best["CLIP-I ↑"] == "**0.250** [0.240, 0.260]" and best["KID ↓"] == "**0.0200** ± 0.0010"
    assert best["trained"] == "22.3 M" and best["λ"] == "1"
    assert "guidance" not in best, "it is the same for all"
    skipped, unfinished = rows["sd_unclip"], rows["style"]
    assert skipped["note"] == "skipped: download it / from <there> and give path=FOLDER"
    assert skipped["trained"] == "870 M (paper)" and skipped["CLIP-I ↑"] == "–"
    assert unfinished["note"] == "unfinished: 1 of 12 images exist"
    assert (unfinished["custom models"], skipped["custom models"]) == ("✓", "✗")


def test_missing_metrics_say_why_and_where(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "one", scored(0.5, fid="get Inception", dreamsim="pip install dreamsim"), ["a_0"])
    write_run(tmp_path, "two", scored(0.6, fid="get Inception"), ["a_0"])
    evaluation = read_evaluation(tmp_path)

    text = render("table.md.jinja", evaluation, make_table(evaluation))

    assert "* **FID**: get Inception\n" in text
    assert "* **DreamSim**: pip install dreamsim (one)\n" in text


def papers_values(folder: Path, items: int = 5000, seeds: int = 4, name: str = "coco2017", **run: Any) -> list[str]:
    """The table's columns, which are left out if they are empty."""
    write_items(folder, [f"{number:012d}" for number in range(items)], seeds, name)
    write_run(folder, "mine", scored(0.81), **run)
    row = rows_of(read_evaluation(folder))["mine"]
    return [row.get("CLIP-T, paper", "no column"), row.get("CLIP-I, paper", "no column")]


def test_the_papers_values_are_next_to_ours_on_its_benchmark(tmp_path: Path) -> None:
    """Also in the row of a system that was never run."""
    write_skipped(tmp_path, "sd_unclip", "download it")
    assert papers_values(tmp_path) == ["0.588", "0.828"]

    evaluation = read_evaluation(tmp_path)

    assert rows_of(evaluation)["sd_unclip"]["CLIP-I, paper"] == "0.810"
    assert paper_values(evaluation, evaluation.systems[0]) == {"clip_score": 0.584, "clip_i": 0.81}


OTHERS = [{"items": 100}, {"seeds": 2}, {"name": "demo"}, {"sampling": {"scale": 0.0}}, {"prompt": "caption"}]
OTHERS += [{"sampling": {"guidance_rescale": 0.7}}, {"method": {"trained": 351_285_248}}]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_the_papers_values_are_not_next_to_other_settings(tmp_path: Path, other: dict[str, Any]) -> None:
    assert papers_values(tmp_path, **other) == ["no column"] * 2


def test_every_method_has_a_title_and_the_fine_grained_adapter_its_own_row() -> None:
    methods = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    row = paper_row("IP-Adapter", 49_087_488)

    assert methods and methods <= set(KINDS) and kind_of("IP-Adapter") is kind_of("ip_adapter")
    assert row is not None and (row.clip_score, row.clip_i) == (0.579, 0.835)
    assert paper_row("seecoder", 294_000_000) is None
