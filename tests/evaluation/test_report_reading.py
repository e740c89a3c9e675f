"""Reading a benchmark's folder: what is merged, in which order, and what is said of broken ones."""

import json
from pathlib import Path

import pytest
from report_folder import scored, write_demo, write_items, write_json, write_run, write_skipped

from ipa.errors import UserError
from ipa.evaluation.generation import skip
from ipa.evaluation.report.reading import Score, read_evaluation


def test_everything_that_is_there_is_read_in_the_papers_order(tmp_path: Path) -> None:
    evaluation = read_evaluation(write_demo(tmp_path))

    assert [system.label for system in evaluation.systems] == ["sd_unclip", "style", "mine-0", "mine-0.5", "mine-1.0"]
    assert [system.num_pictures for system in evaluation.systems] == [0, 1, 12, 12, 12]
    assert evaluation.system("style").num_planned == 12
    assert evaluation.system("mine-1.0").scores["clip_i"] == Score(0.25, 0.24, 0.26, higher=True)
    assert evaluation.system("mine-1.0").hashes["pictures"] == "f00d"


def test_a_deviation_belongs_to_its_value(tmp_path: Path) -> None:
    scores = read_evaluation(write_demo(tmp_path)).system("mine-0").scores

    assert scores["kid"].deviation == 0.001 and "kid_std" not in scores


def test_a_value_that_is_no_number_is_missing(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "mine", scored(float("nan"), {"a": float("nan")}), ["a_0"])

    (system,) = read_evaluation(tmp_path).systems

    assert "clip_i" not in system.scores and "not a finite number" in system.missing["clip_i"]
    assert system.per_item["clip_i"] == {}


def test_scores_of_an_unfinished_run_do_not_count(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "mine", scored(0.5), ["a_0"], status="unfinished")

    assert read_evaluation(tmp_path).systems[0].scores == {}


def test_what_the_runner_writes_of_a_skipped_system_is_read(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    skip(tmp_path / "seecoder", "seecoder", "seecoder", "download it")

    (system,) = read_evaluation(tmp_path).systems

    assert (system.name, system.status, system.reason) == ("seecoder", "skipped", "download it")


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no evaluation there, items\.json is missing.*evaluate\.py"):
        read_evaluation(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_evaluation(tmp_path / "nowhere")
    write_items(tmp_path, ["a"])
    with pytest.raises(UserError, match="no system yet"):
        read_evaluation(tmp_path)


def test_a_folder_of_two_benchmarks_is_refused(tmp_path: Path) -> None:
    write_items(tmp_path / "coco2017", ["a"])
    write_items(tmp_path / "demo", ["a"])

    with pytest.raises(ValueError, match=r"holds the benchmarks coco2017, demo; .*folder=.*coco2017"):
        read_evaluation(tmp_path)


def test_pictures_of_another_benchmark_are_refused(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "mine", None, ["a_0", "zebra_0"])

    with pytest.raises(ValueError, match=r"mine/manifest\.json: 1 of its items \(zebra …\).*another benchmark"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize("name", ["items.json", "mine-0/manifest.json", "mine-0/scores.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    path = write_demo(tmp_path) / name
    path.write_bytes(path.read_bytes()[:40])

    with pytest.raises(ValueError, match=rf"{name} is not JSON .*Remove it"):
        read_evaluation(tmp_path)


def test_a_missing_part_is_named_with_its_file(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    write_skipped(tmp_path, "seecoder", "download it")
    write_json(tmp_path / "items.json", {**json.loads((tmp_path / "items.json").read_text()), "num_seeds": "two"})

    with pytest.raises(ValueError, match=r"items\.json: 'num_seeds' is a str, expected int"):
        read_evaluation(tmp_path)
    write_json(tmp_path / "seecoder" / "manifest.json", {"label": "seecoder"})
    with pytest.raises(ValueError, match=r"seecoder/manifest\.json: 'status' is missing"):
        read_evaluation(tmp_path)


def test_an_unknown_label_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"system=theirs: not one of sd_unclip, style, mine-0"):
        read_evaluation(write_demo(tmp_path)).system("theirs")
