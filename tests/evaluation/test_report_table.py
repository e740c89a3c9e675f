"""The table: Table 1's columns, intervals, missing values and reasons, the paper's values where they are comparable.

And how a benchmark's folder is read: what, in which order, and the errors for broken ones.
"""

from pathlib import Path
from typing import Any

import pytest
from report_folder import scored, write_demo, write_items, write_run, write_skipped

from ipa.errors import UserError
from ipa.evaluation.generation import skip
from ipa.evaluation.report.names import KINDS, kind_of, paper_row
from ipa.evaluation.report.page import render
from ipa.evaluation.report.reading import Evaluation, Score, read_evaluation
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


def test_everything_that_is_there_is_read_in_the_papers_order(tmp_path: Path) -> None:
    folder = write_demo(tmp_path)
    skip(folder / "seecoder", "seecoder", "seecoder", "download it")  # as the runner writes it
    systems = {system.label: system for system in read_evaluation(folder).systems}
    best, skipped = systems["mine-1.0"], systems["seecoder"]

    assert [*systems] == ["sd_unclip", "style", "seecoder", "mine-0", "mine-0.5", "mine-1.0"]
    assert [system.num_pictures for system in systems.values()] == [0, 1, 0, 12, 12, 12]
    assert systems["style"].num_planned == 12
    assert best.scores["clip_i"] == Score(0.25, 0.24, 0.26, higher=True)
    assert best.scores["kid"].deviation == 0.001 and "kid_std" not in best.scores
    assert best.settings["sha256 of pictures"] == "f00d"
    assert (skipped.name, skipped.status, skipped.reason) == ("seecoder", "skipped", "download it")


def test_scores_that_are_not_finite_or_of_an_unfinished_run_do_not_count(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "a", scored(float("nan"), {"a": float("nan")}), ["a_0"])
    write_run(tmp_path, "b", scored(0.5), ["a_0"], status="unfinished")

    infinite, unfinished = read_evaluation(tmp_path).systems

    assert "clip_i" not in infinite.scores and "not a finite number" in infinite.missing["clip_i"]
    assert infinite.per_item["clip_i"] == {} and unfinished.scores == {}


def test_a_folder_without_one_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"items\.json is missing.*evaluate\.py"):
        read_evaluation(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_evaluation(tmp_path / "nowhere")
    write_items(tmp_path, ["a"])
    with pytest.raises(UserError, match="no system yet"):
        read_evaluation(tmp_path)
    for name in ("coco2017", "demo"):
        write_items(tmp_path / name, ["a"])
    with pytest.raises(UserError, match=r"coco2017, demo; .*folder=.*coco2017"):
        read_evaluation(tmp_path)


def test_images_of_another_benchmark_are_refused(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    for benchmark, message in (
        ({"name": "coco2017"}, "name coco2017, not demo"),
        ({"name": "demo", "fingerprint": "f00"}, "fingerprint f00, not abc123"),
    ):
        write_run(tmp_path, "mine", None, ["a_0"], benchmark=benchmark)
        with pytest.raises(UserError, match=rf"mine/manifest\.json: .*another benchmark .*{message}"):
            read_evaluation(tmp_path)


def test_a_broken_or_foreign_file_is_named(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "mine", scored(0.5), ["a_0"])
    foreign = r"is not as evaluate\.py writes it"
    for file in (tmp_path / name for name in ("mine/scores.json", "mine/manifest.json", "items.json")):
        before = file.read_text()
        for content, message in (
            ('{"metrics": ', "is not JSON"),
            ("{}", foreign),
            ('{"items": [1], "status": "complete", "pictures": [1], "metrics": []}', foreign),
        ):
            file.write_text(content)
            with pytest.raises(UserError, match=f"{file.name} {message}"):
                read_evaluation(tmp_path)
        file.write_text(before)
