"""Reading a benchmark's folder: what is read, in which order, and the errors for broken ones."""

from pathlib import Path

import pytest
from report_folder import scored, write_demo, write_items, write_run

from ipa.errors import UserError
from ipa.evaluation.generation import skip
from ipa.evaluation.report.reading import Score, read_evaluation


def test_everything_that_is_there_is_read_in_the_papers_order(tmp_path: Path) -> None:
    systems = read_evaluation(write_demo(tmp_path)).systems

    assert [system.label for system in systems] == ["sd_unclip", "style", "mine-0", "mine-0.5", "mine-1.0"]
    assert [system.num_pictures for system in systems] == [0, 1, 12, 12, 12] and systems[1].num_planned == 12
    assert systems[-1].scores["clip_i"] == Score(0.25, 0.24, 0.26, higher=True)
    assert systems[-1].scores["kid"].deviation == 0.001 and "kid_std" not in systems[-1].scores
    assert systems[-1].settings["sha256 of pictures"] == "f00d"


def test_scores_that_are_not_finite_or_of_an_unfinished_run_do_not_count(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "a", scored(float("nan"), {"a": float("nan")}), ["a_0"])
    write_run(tmp_path, "b", scored(0.5), ["a_0"], status="unfinished")

    infinite, unfinished = read_evaluation(tmp_path).systems

    assert "clip_i" not in infinite.scores and "not a finite number" in infinite.missing["clip_i"]
    assert infinite.per_item["clip_i"] == {} and unfinished.scores == {}


def test_what_the_runner_writes_of_a_skipped_system_is_read(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    skip(tmp_path / "seecoder", "seecoder", "seecoder", "download it")

    (system,) = read_evaluation(tmp_path).systems

    assert (system.name, system.status, system.reason) == ("seecoder", "skipped", "download it")


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


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        ({"name": "coco2017"}, "name coco2017, not demo"),
        ({"name": "demo", "fingerprint": "f00"}, "fingerprint f00, not abc123"),
    ],
    ids=["name", "fingerprint"],
)
def test_images_of_another_benchmark_are_refused(tmp_path: Path, benchmark: dict[str, str], message: str) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "mine", None, ["a_0"], benchmark=benchmark)

    with pytest.raises(UserError, match=rf"mine/manifest\.json: .*another benchmark .*{message}"):
        read_evaluation(tmp_path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "mine", scored(0.5), ["a_0"])
    for name in ("mine/scores.json", "mine/manifest.json", "items.json"):
        (tmp_path / name).write_text('{"metrics": ')
        with pytest.raises(UserError, match=f"{name} is not JSON"):
            read_evaluation(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"items": [1], "status": "complete", "pictures": [1], "metrics": []}'])
def test_a_foreign_file_is_named(tmp_path: Path, content: str) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "mine", scored(0.5), ["a_0"])
    for name in ("mine/scores.json", "mine/manifest.json", "items.json"):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name} is not as evaluate\.py writes it"):
            read_evaluation(tmp_path)
        (tmp_path / name).write_text(before)
