"""Reading a benchmark's folder: what is read, in which order, and the errors for broken ones."""

from pathlib import Path

import pytest
from report_folder import scored, write_demo, write_items, write_run

from ipa.errors import UserError
from ipa.evaluation.generation import skip
from ipa.evaluation.report.reading import Score, read_evaluation


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
