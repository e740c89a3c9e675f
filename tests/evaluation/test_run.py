"""`python evaluate.py` from items to scores: what is there is never made again, whatever stops it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import tiny
import torch
from conftest import Run, compose, usual
from PIL import Image

from ipa.evaluation import run as module
from ipa.evaluation.generation import check_finite, read_png
from ipa.evaluation.report.reading import read_evaluation
from ipa.evaluation.run import evaluate
from ipa.export.published import to_published
from ipa.export.storage import read_metadata, save_adapter


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "pictures").iterdir())}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_pictures_scores_and_manifest(run: Run) -> None:
    out = run("label=x")

    asked, told, scores = (read(out / name) for name in ("items.json", "x/manifest.json", "x/scores.json"))
    assert [item["id"] for item in asked["items"]] == [f"picture{n}" for n in range(5)]
    assert all(Image.open(out / item["reference"]).size for item in asked["items"])
    assert told["status"] == "complete" and len(told["pictures"]) == 10 == len(pictures(out / "x"))
    assert all((out / "x" / picture["file"]).is_file() for picture in told["pictures"])
    assert told["method"]["uses_text"] and told["method"]["trained"] > 0
    assert told["sampling"] == {"num_steps": 2, "guidance": 2.0, "scale": 1.0, "image_size_px": None}
    assert {"torch", "diffusers", "python"} <= told["versions"].keys()
    interval = scores["metrics"]["clip_i"]
    assert interval["low"] <= interval["value"] <= interval["high"]
    assert list(scores["per_item"]["clip_i"]) == [f"picture{n}" for n in range(5)]
    mean = sum(scores["per_item"]["clip_i"].values()) / 5
    assert mean == pytest.approx(interval["value"], abs=1e-6)
    assert read_png(out / "x/pictures/picture0_0.png").shape == (3, 16, 16)


def test_the_same_again_makes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run("label=x")
    before = {path: path.stat().st_mtime_ns for path in (out / "x/pictures").iterdir()}
    monkeypatch.setattr(module, "generate", generate_nothing)

    run("label=x")

    assert {path: path.stat().st_mtime_ns for path in (out / "x/pictures").iterdir()} == before


def generate_nothing(folder, method, tasks, *rest) -> int:
    assert all((folder / task.file).is_file() for task in tasks)
    return 0


def test_seeds_and_scale_decide_the_pictures(run: Run) -> None:
    out = run("label=x")
    run("label=again")
    run("label=off", "sampling.scale=0")
    run("label=seed", "seed=1")

    x, again, off, seed = (pictures(out / name) for name in ("x", "again", "off", "seed"))
    assert x == again and x.keys() == off.keys() == seed.keys()
    assert all(x[name] != off[name] and x[name] != seed[name] for name in x)
    assert len(set(x.values())) == 10


def test_other_settings_do_not_mix_with_what_is_there(run: Run) -> None:
    run("label=x")
    with pytest.raises(ValueError, match=r"holds pictures of other settings \(sampling: .*\): say label="):
        run("label=x", "sampling.scale=0.5")
    with pytest.raises(ValueError, match=r"of another question \(num seeds\): say out="):
        run("label=y", "num_seeds=1")


def test_an_adapter_that_was_trained_further_is_another(run: Run, adapter: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(adapter.read_bytes())
    run("label=x", f"adapter={mine}")
    model = tiny.shake(tiny.make_model(), seed=2)
    save_adapter(mine, to_published(model.trainable.state_dict()), read_metadata(mine))
    with pytest.raises(ValueError, match=r"of other settings \(files: "):
        run("label=x", f"adapter={mine}")


def test_a_folder_of_another_benchmark_is_noticed(run: Run, prompts: Path, tmp_path: Path) -> None:
    """Items have the same names there, and are other pictures."""
    others = tmp_path / "others"
    others.mkdir()
    for path in prompts.iterdir():
        content = path.read_bytes()
        (others / path.name).write_bytes(content if path.suffix == ".txt" else content + bytes(1))
    out = run("label=x")
    there = run("label=y", f"benchmark.folder={others}", f"out={tmp_path / 'there'}").with_name("there")
    assert read(out / "x/manifest.json")["benchmark"] == {
        "name": "folder",
        "fingerprint": read(out / "items.json")["benchmark"]["settings"]["fingerprint"],
    }
    (out / "x").rename(there / "x")

    for more in ((), ("generate=false",)):
        with pytest.raises(ValueError, match=r"of other settings \(benchmark: .*folder.*, now"):
            run("label=x", f"benchmark.folder={others}", f"out={there}", *more)
    with pytest.raises(ValueError, match=r"x/manifest\.json: .*another benchmark \(fingerprint"):
        read_evaluation(there)


def test_pictures_of_unknown_origin_are_not_taken(run: Run) -> None:
    out = run("label=x")
    (out / "x/manifest.json").unlink()
    with pytest.raises(ValueError, match="without a manifest"):
        run("label=x")


def test_a_complete_run_stays_as_it_is(run: Run) -> None:
    out = run("label=x")
    path = out / "x/manifest.json"
    path.write_text(json.dumps({**read(path), "seconds": 1000.0, "device": "another"}))
    before = path.read_bytes()
    run("label=x", "+metric@metrics.border=border")
    assert path.read_bytes() == before

    (out / "x/pictures/picture1_0.png").rename(out / "x/pictures/.picture1_0.png.4711.tmp")  # as a kill leaves it
    run("label=x")
    assert sorted(pictures(out / "x")) == sorted(Path(each["file"]).name for each in read(path)["pictures"])
    assert read(path)["seconds"] >= 1000 and read(path)["device"] != "another"


def test_scores_alone_need_all_pictures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"generate=false, but .*x has no pictures yet"):
        run("label=x", "generate=false")
    out = run("label=x")
    (out / "x/scores.json").unlink()
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run("label=x", "generate=false", "adapter=null")
        assert (out / "x/scores.json").is_file() == (rank == 0)
    (out / "x/pictures/picture1_0.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 10 pictures are not in .*picture1_0\.png"):
        run("label=x", "generate=false")


def test_weights_that_are_gone_do_not_take_the_pictures_along(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    out = run("label=x")
    run("label=x", "adapter=nowhere.safetensors")
    assert read(out / "x/manifest.json")["status"] == "complete" and "generate=false" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "complaints"),
    [
        (["batch_size=0"], ["batch_size=0: a whole number from 1"]),
        (["num_seeds=many", "sampling.num_steps=0"], ["num_seeds=many: a whole", "sampling.num_steps=0: a whole"]),
        (["benchmark.limit=-1", "seed=x"], ["benchmark.limit=-1: a whole", "seed=x: a whole number from 0"]),
        (["sampling.image_size_px=65"], ["sampling.image_size_px=65: a multiple of 8"]),
        (
            ["sampling.scale=much", "sampling.guidance=nan"],
            ["sampling.scale=much: a number", "guidance=nan: a number"],
        ),
        (["prompt=captoin"], ["prompt=captoin: one of empty, caption"]),
        (["label=a/b"], ["label=a/b: the name of a folder"]),
        (["label=references"], ["label=references: the name of a folder"]),
        ([f"label={'x' * 300}"], ["is too long for a folder's name"]),
        (["device=gpu"], ["device=gpu: null for a GPU if there is one, cpu"]),
        (["device=cuda:99"], ["device=cuda:99: torch finds "]),
    ],
)
def test_wrong_values_are_told_before_anything_is_written(
    run: Run, tmp_path: Path, overrides: list[str], complaints: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"(?s)^.+$") as caught:
        run(*overrides)
    assert all(complaint in str(caught.value) for complaint in complaints)
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_no_numbers_are_refused() -> None:
    pixels_B3HW = torch.zeros(3, 3, 4, 4)
    check_finite(pixels_B3HW, "x")
    pixels_B3HW[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"x: 1 of 3 pictures .*method\.dtype=float32"):
        check_finite(pixels_B3HW, "x")


def test_captions_can_be_the_text(run: Run) -> None:
    out = run("label=x", "benchmark.limit=2")
    run("label=text", "benchmark.limit=2", "prompt=caption")
    assert [entry["text"] for entry in read(out / "text/manifest.json")["pictures"]] == ["thing 0"] * 2 + [
        "thing 1"
    ] * 2
    assert all(pictures(out / "x")[name] != content for name, content in pictures(out / "text").items())
    with pytest.raises(ValueError, match="1 items have none"):
        run("label=y", "prompt=caption", "out=" + str(out.with_name("other")))


@pytest.mark.parametrize("gone", [["picture0_1.png"], ["picture3_0.png", "picture4_1.png"]])
def test_what_is_missing_is_made_again_to_the_bit(run: Run, gone: list[str]) -> None:
    out = run("label=x")
    whole = pictures(out / "x")
    for name in gone:
        (out / "x/pictures" / name).unlink()

    run("label=x")

    assert pictures(out / "x") == whole


def test_two_processes_share_the_batches(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run("label=alone")
    made = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run("label=shared")
        made.append(len(pictures(out / "shared")))
        assert (out / "shared/scores.json").is_file() == (rank == 1)  # the last one scores
    assert made == [6, 10]  # batches of 4, 4, 2
    assert pictures(out / "shared") == pictures(out / "alone")


def test_a_new_metric_makes_no_picture(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run("label=x")
    monkeypatch.setattr(module, "generate", generate_nothing)

    run("label=x", "+metric@metrics.border=border")

    metrics = read(out / "x/scores.json")["metrics"]
    assert {"clip_i", "border_lab"} <= metrics.keys()


def test_changed_pictures_are_scored_anew(run: Run) -> None:
    out = run("label=x")
    before = read(out / "x/scores.json")
    Image.new("RGB", (16, 16), "red").save(out / "x/pictures/picture1_0.png")

    run("label=x")

    after = read(out / "x/scores.json")
    assert after["pictures"] != before["pictures"]
    assert after["per_item"]["clip_i"]["picture1"] != before["per_item"]["clip_i"]["picture1"]


def test_another_judge_scores_anew(run: Run, tmp_path: Path) -> None:
    out = run("label=x")
    before = read(out / "x/scores.json")["per_item"]["clip_i"]
    other = tiny.save_clip(tmp_path / "other", seed=5)

    run("label=x", f"judge.name={other}")
    assert read(out / "x/scores.json")["per_item"]["clip_i"] != before
    run("label=x", "judge.name=local-dir:nowhere")  # whose scores the old ones are not
    scores = read(out / "x/scores.json")
    assert "nowhere" in scores["missing"]["clip"] and not scores["metrics"] and not scores["per_item"]
    run("label=x")
    assert read(out / "x/scores.json")["per_item"]["clip_i"] == before


def test_what_cannot_be_told_of_so_few_is_noted(run: Run) -> None:
    out = run("label=x", "benchmark.limit=1", "num_seeds=1", "+metric@metrics.fid_judge=fid_judge")
    scores = read(out / "x/scores.json")
    assert "sets of two or more, not 1 with 1" in scores["missing"]["fid_judge"] and "clip_i" in scores["metrics"]


def test_a_missing_network_is_noted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = run("label=x", "+metric@metrics.other=dinov2", "metrics.other.network.path=/nowhere/dinov2")
    scores = read(out / "x/scores.json")
    assert "/nowhere/dinov2" in scores["missing"]["other"] and "clip_i" in scores["metrics"]


def test_missing_weights_end_as_skipped(run: Run) -> None:
    out = run("label=x", "adapter=nowhere.safetensors")
    told = read(out / "x/manifest.json")
    assert told["status"] == "skipped" and told["method"]["name"] == "IP-Adapter"
    assert "adapter=nowhere.safetensors: no such file" in told["reason"]
    run("label=x", "method.base=nowhere/at/all")
    assert "method.base=nowhere/at/all" in read(out / "x/manifest.json")["reason"]
    run("label=x")  # once they are there it runs
    assert read(out / "x/manifest.json")["status"] == "complete"


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["adapter=demo/adapters/simple_global.safetensors"], "ip_adapter-simple_global"),
        (["adapter=runs/decoupled_global/mine/adapter.safetensors", "sampling.scale=0.5"],
         "ip_adapter-decoupled_global-mine-scale0.5"),
        (["method=ip_adapter", "benchmark.limit=3", "out=x", "prompt=caption"], "ip_adapter-promptcaption"),
        (["adapter=adapter.safetensors"], "ip_adapter-adapter"),
        (["adapter=a/mine.safetensors", "method.base=owner/tuned"], "ip_adapter-mine-baseowner_tuned"),
        (["+metric@metrics.mine=border", "~metrics.clip", "judge.name=local-dir:x", "generate=false"], "ip_adapter"),
    ],
)  # fmt: skip
def test_labels_tell_what_was_asked(overrides: list[str], label: str) -> None:
    cfg = compose(*overrides)
    assert module.label_of(cfg) == label


def evaluate_alone(overrides: list[str]) -> None:
    torch.set_num_threads(1)
    os.setsid()
    evaluate(compose(*overrides))


@pytest.mark.slow
def test_kills_leave_no_trace(prompts: Path, adapter: Path, clip_name: str, tmp_path: Path) -> None:
    """Kill -9 at random moments of the generation; then the pictures are those of a run in one go."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def start(label: str) -> multiprocessing.process.BaseProcess:
        many = ["num_seeds=40", "sampling.num_steps=10", f"label={label}"]
        arguments = [*usual(prompts, adapter, clip_name, tmp_path / "out"), *many]
        process = context.Process(target=evaluate_alone, args=(arguments,))
        process.start()
        return process

    whole = start("whole")
    whole.join()
    assert whole.exitcode == 0
    folder, draw, kills = tmp_path / "out/killed", random.Random(), 0
    for _ in range(8):
        process, before = start("killed"), len(list(folder.glob("pictures/*.png")))
        while process.is_alive() and len(list(folder.glob("pictures/*.png"))) <= before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        kills += process.is_alive()
        process.kill()
        process.join()
    last = start("killed")
    last.join()

    assert last.exitcode == 0 and kills >= 3
    assert pictures(folder) == pictures(tmp_path / "out/whole")
    assert len(pictures(folder)) == 200
