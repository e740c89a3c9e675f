"""Reading a benchmark's folder: what is read, in which order, and the errors for broken ones."""

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
    assert evaluation.systems[1].num_planned == 12
    assert evaluation.systems[-1].scores["clip_i"] == Score(0.25, 0.24, 0.26, higher=True)
    assert evaluation.systems[-1].hashes["pictures"] == "f00d"


def test_a_deviation_belongs_to_its_value(tmp_path: Path) -> None:
    scores = read_evaluation(write_demo(tmp_path)).systems[2].scores

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


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"items\.json is missing.*evaluate\.py"):
        read_evaluation(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_evaluation(tmp_path / "nowhere")
    write_items(tmp_path, ["a"])
    with pytest.raises(UserError, match="no system yet"):
        read_evaluation(tmp_path)


def test_a_folder_of_two_benchmarks_is_refused(tmp_path: Path) -> None:
    write_items(tmp_path / "coco2017", ["a"])
    write_items(tmp_path / "demo", ["a"])

    with pytest.raises(UserError, match=r"coco2017, demo; .*folder=.*coco2017"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("pictures", "benchmark", "message"),
    [
        (["a_0", "zebra_0"], {}, r"1 of its items \(zebra …\)"),
        (["a_0"], {"name": "coco2017"}, "name coco2017, not demo"),
        (["a_0"], {"name": "demo", "fingerprint": "f00"}, "fingerprint f00, not abc123"),
    ],
    ids=["items", "name", "fingerprint"],
)
def test_images_of_another_benchmark_are_refused(
    tmp_path: Path, pictures: list[str], benchmark: dict[str, str], message: str
) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "mine", None, pictures, benchmark=benchmark)

    with pytest.raises(UserError, match=rf"mine/manifest\.json: .*another benchmark .*{message}"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize("name", ["items.json", "mine-0/manifest.json", "mine-0/scores.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    path = write_demo(tmp_path) / name
    path.write_bytes(path.read_bytes()[:40])

    with pytest.raises(UserError, match=f"{name} is not JSON"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("items.json", "num_seeds", "two", "'num_seeds' is a str, expected int"),
        ("seecoder/manifest.json", "status", None, "'status' is missing"),
    ],
)
def test_a_missing_or_wrong_value_is_named(tmp_path: Path, name: str, key: str, value: object, message: str) -> None:
    write_items(tmp_path, ["a"])
    write_skipped(tmp_path, "seecoder", "download it")
    content = json.loads((tmp_path / name).read_text())
    del content[key]
    write_json(tmp_path / name, content if value is None else {**content, key: value})

    with pytest.raises(UserError, match=rf"{name}: {message}"):
        read_evaluation(tmp_path)
