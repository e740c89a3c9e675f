"""`python evaluate.py` from items to scores: what is there is never made again, whatever stops it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch
from conftest import Run, compose, usual
from PIL import Image

from ipa.evaluation import run as module
from ipa.evaluation.generation import read_png
from ipa.evaluation.run import evaluate


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
    with pytest.raises(ValueError, match="of other items or numbers of seeds: say out="):
        run("label=y", "num_seeds=1")


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
    run("label=x")  # once they are there it runs
    assert read(out / "x/manifest.json")["status"] == "complete"


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["adapter=demo/adapters/simple_global.safetensors"], "ip_adapter-simple_global"),
        (["adapter=runs/decoupled_global/mine/adapter.safetensors", "sampling.scale=0.5"],
         "ip_adapter-decoupled_global-mine-scale0.5"),
        (["method=ip_adapter", "benchmark.limit=3", "out=x", "prompt=caption"], "ip_adapter-promptcaption"),
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
