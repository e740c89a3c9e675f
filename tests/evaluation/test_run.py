"""`python evaluate.py` from items to scores: nothing is made twice, whatever stops it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Run, compose, make_flow_adapter, usual
from PIL import Image

from ipa.errors import UserError
from ipa.evaluation import run as module
from ipa.evaluation.benchmarks import FolderBenchmark, plan
from ipa.evaluation.generation import check_finite, read_png
from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.report.reading import read_evaluation
from ipa.evaluation.run import evaluate, rank_and_world
from ipa.export.loading import load_model
from ipa.export.published import to_published
from ipa.export.storage import load_adapter, save_adapter
from ipa.sampling import SamplingOptions, generate
from ipa.types import to_uint8


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "pictures").iterdir())}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a picture has to be made."""

    def generate(folder: Path, method: object, tasks: Any, *rest: object) -> None:
        assert all((folder / task.file).is_file() for task in tasks)

    monkeypatch.setattr(module, "generate", generate)


def test_pictures_scores_and_manifest(evaluated: Path) -> None:
    items, manifest, scores = (read(evaluated / name) for name in ("items.json", "x/manifest.json", "x/scores.json"))
    assert [item["id"] for item in items["items"]] == [f"picture{n}" for n in range(5)]
    assert all(Image.open(evaluated / item["reference"]).size for item in items["items"])
    assert manifest["status"] == "complete" and len(manifest["pictures"]) == 10 == len(pictures(evaluated / "x"))
    assert all((evaluated / "x" / picture["file"]).is_file() for picture in manifest["pictures"])
    assert manifest["method"]["uses_text"] and manifest["method"]["trained"] > 0
    sampling = {"num_steps": 2, "guidance": 2.0, "scale": 1.0, "image_size_px": None, "guidance_rescale": 0.0}
    assert manifest["sampling"] == sampling and manifest["batch_size"] == 4
    assert {"torch", "diffusers", "python"} <= manifest["versions"].keys()
    interval = scores["metrics"]["clip_i"]
    assert interval["low"] <= interval["value"] <= interval["high"]
    assert list(scores["per_item"]["clip_i"]) == [f"picture{n}" for n in range(5)]
    mean = sum(scores["per_item"]["clip_i"].values()) / 5
    assert mean == pytest.approx(interval["value"], abs=1e-6)
    assert read_png(evaluated / "x/pictures/picture0_0.png").shape == (3, 16, 16)


def test_seeds_and_scale_decide_the_pictures(run: Run, out: Path) -> None:
    run("label=off", "sampling.scale=0", "~metrics.clip")
    run("label=seed", "seed=1", "~metrics.clip")

    x, off, seed = (pictures(out / name) for name in ("x", "off", "seed"))
    assert x.keys() == off.keys() == seed.keys()
    assert all(x[name] != off[name] and x[name] != seed[name] for name in x)


def test_rescaled_guidance_is_that_of_every_other_command(run: Run, prompts: Path, adapter: Path, out: Path) -> None:
    """The pictures of ``ipa.sampling`` with the same options and seeds; nothing else in the manifest changes."""
    few = ["label=rescaled", "sampling.guidance=5", "sampling.guidance_rescale=0.7", "~metrics.clip"]
    run(*few)
    assert read(out / "rescaled/manifest.json")["sampling"]["guidance_rescale"] == 0.7

    benchmark, model = FolderBenchmark("folder", str(prompts)), load_model(adapter)
    tasks = plan(benchmark.items(), 2, 0, "empty")[:4]
    cut = [Prompt(benchmark.read(task.item), "", task.seed).cut(model.encoder.image_size_px) for task in tasks]
    features, seeds = model.encode_reference(torch.stack(cut)), [task.seed for task in tasks]
    for rescale in (0.7, 0.0):
        options = SamplingOptions(num_steps=2, guidance=5, guidance_rescale=rescale)
        expected = to_uint8(generate(model, features, [""] * 4, seeds, options))
        found = torch.stack([read_png(out / "rescaled" / task.file) for task in tasks])
        assert torch.equal(found, expected) == (rescale == 0.7)


def test_other_settings_do_not_mix_with_what_is_there(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results from before an option was added are those of its default."""
    no_pictures(monkeypatch)
    path = out / "x/manifest.json"
    older = read(path)
    del older["sampling"]["guidance_rescale"]
    path.write_text(json.dumps(older))
    run("label=x")
    for label, option, message in (
        ("x", "sampling.guidance_rescale=0.5", "sampling"),
        ("x", "sampling.scale=0.5", r"other settings \(sampling: .*label="),
        ("y", "num_seeds=1", r"different settings \(num_seeds\).*out="),
    ):
        with pytest.raises(UserError, match=message):
            run(f"label={label}", option)
    path.unlink()
    with pytest.raises(UserError, match="without a manifest"):
        run("label=x")


def test_an_adapter_that_was_trained_further_is_another(run: Run, adapter: Path, tmp_path: Path) -> None:
    few = ("benchmark.limit=1", "num_seeds=1", "~metrics.clip", f"adapter={tmp_path / 'run'}")
    mine = tmp_path / "run" / "adapter.safetensors"  # a run's folder
    mine.parent.mkdir()
    mine.write_bytes(adapter.read_bytes())
    run("label=x", *few)
    model = tiny.shake(tiny.make_model(), seed=2)
    save_adapter(mine, to_published(model.trainable.state_dict()), load_adapter(mine)[1])
    with pytest.raises(UserError, match=r"other settings \(files: "):
        run("label=x", *few)


def test_a_folder_of_another_benchmark_is_noticed(run: Run, out: Path, prompts: Path, tmp_path: Path) -> None:
    """Items have the same names there, and are other pictures."""
    others = tmp_path / "others"
    others.mkdir()
    for path in prompts.iterdir():
        content = path.read_bytes()
        (others / path.name).write_bytes(content if path.suffix == ".txt" else content + bytes(1))
    fingerprint = read(out / "items.json")["benchmark"]["settings"]["fingerprint"]
    assert read(out / "x/manifest.json")["benchmark"] == {"name": prompts.name, "fingerprint": fingerprint}
    there = tmp_path / "there"
    shutil.copytree(out / "x", there / "x")

    for more in ((), ("generate=false",)):
        with pytest.raises(UserError, match=r"other settings \(benchmark: .*, now"):
            run("label=x", f"benchmark.folder={others}", f"out={there}", *more)
    with pytest.raises(UserError, match=r"x/manifest\.json.*fingerprint"):
        read_evaluation(there)


def test_a_complete_run_stays_as_it_is(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new metric makes no picture; a missing one is made, and a file that a kill left goes."""
    path = out / "x/manifest.json"
    path.write_text(json.dumps({**read(path), "seconds": 1000.0, "device": "another"}))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (path, *(out / "x/pictures").iterdir())}
    with monkeypatch.context() as patch:
        no_pictures(patch)
        run("label=x", "+metric@metrics.border=border")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert {"clip_i", "border_lab"} <= read(out / "x/scores.json")["metrics"].keys()

    (out / "x/pictures/picture1_0.png").rename(out / "x/pictures/.picture1_0.png.4711.tmp")
    run("label=x")
    assert sorted(pictures(out / "x")) == sorted(Path(each["file"]).name for each in read(path)["pictures"])
    assert read(path)["seconds"] >= 1000 and read(path)["device"] != "another"


def test_scores_alone_need_all_pictures(run: Run, evaluated: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match=r"generate=false, but .*x has no images yet"):
        run("label=x", "generate=false")
    out = Path(shutil.copytree(evaluated, tmp_path / "out", dirs_exist_ok=True))
    (out / "x/scores.json").unlink()
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run("label=x", "generate=false", "adapter=null")
        assert (out / "x/scores.json").is_file() == (rank == 0)
    (out / "x/pictures/picture1_0.png").unlink()
    with pytest.raises(UserError, match=r"1 of 10 images are not in .*picture1_0\.png"):
        run("label=x", "generate=false")


WRONG = {
    "sampling.image_size_px=65": r"sampling\.image_size_px=65: a multiple of 8",
    "prompt=captoin": "prompt=captoin: one of empty, caption",
    "adapter=nowhere.safetensors": r"adapter=nowhere\.safetensors: no such file",
    "label=a/b": "label=a/b: ",
    "label=references": "label=references: ",
    f"label={'x' * 300}": "is too long for a folder's name",
    "device=gpu": "device=gpu: ",
    "device=cuda:99": "device=cuda:99: torch finds ",
    "method=open_unclip sampling.guidance_rescale=0.7": r"sampling\.guidance_rescale=0\.7: .*open_unclip",
    "sampling.guidance_rescale=7": "guidance_rescale=7: ",
}


@pytest.mark.parametrize("overrides", WRONG)
def test_wrong_values_are_told_before_anything_is_written(run: Run, tmp_path: Path, overrides: str) -> None:
    with pytest.raises(UserError, match=f"(?s){WRONG[overrides]}"):
        run(*overrides.split())
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_not_finite_are_refused() -> None:
    pixels_B3HW = torch.zeros(3, 3, 4, 4)
    check_finite(pixels_B3HW, "x")
    pixels_B3HW[1, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"x: image 1 .*method\.dtype=float32"):
        check_finite(pixels_B3HW, "x")


def test_captions_can_be_the_text(run: Run, out: Path, tmp_path: Path) -> None:
    there = run("label=text", "benchmark.limit=2", "prompt=caption", f"out={tmp_path / 'there'}").with_name("there")
    texts = [entry["text"] for entry in read(there / "text/manifest.json")["pictures"]]
    assert texts == ["thing 0"] * 2 + ["thing 1"] * 2
    assert all(pictures(out / "x")[name] != content for name, content in pictures(there / "text").items())


@pytest.mark.parametrize(
    "family", ["unet", "flux", *(pytest.param(each, marks=pytest.mark.slow) for each in ("chroma", "sd3"))]
)
def test_what_is_missing_is_made_again_to_the_bit(
    family: str, evaluated: Path, out: Path, prompts: Path, adapter: Path, clip_name: str, tmp_path: Path
) -> None:
    """Pictures of the first and of the last batch; also those of adapters for transformers."""
    if family != "unet":
        adapter, evaluated = make_flow_adapter(family, clip_name, tmp_path), tmp_path / "flow"
        evaluate(compose(*usual(prompts, adapter, clip_name, evaluated), "label=x"))
        out = Path(shutil.copytree(evaluated, tmp_path / "copy"))
    for name in ("picture0_1.png", "picture4_1.png"):
        (out / "x/pictures" / name).unlink()
    evaluate(compose(*usual(prompts, adapter, clip_name, out), "label=x"))
    assert pictures(out / "x") == pictures(evaluated / "x") and len({*pictures(out / "x").values()}) == 10


def test_two_processes_share_the_batches(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run("label=shared")
        made.append(len(pictures(out / "shared")))
        assert (out / "shared/scores.json").is_file() == (rank == 1)  # the last one scores
    assert made == [6, 10]  # batches of 4, 4, 2
    assert pictures(out / "shared") == pictures(out / "x")


SBATCH = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
SRUN = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}
ONE = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}


def test_torchrun_and_srun_say_which_process_this_is() -> None:
    assert [rank_and_world(each) for each in ({}, ONE, {**ONE, "SLURM_STEP_NUM_TASKS": "1"})] == [(0, 1)] * 3
    assert rank_and_world(SRUN) == (3, 4) and rank_and_world({"RANK": "1", "WORLD_SIZE": "2", **SBATCH}) == (1, 2)


@pytest.mark.parametrize("environment", [SBATCH, {"SLURM_NTASKS": "4"}, {**SBATCH, "SLURM_STEP_NUM_TASKS": "1"}])
def test_one_process_in_an_allocation_of_several_tasks_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"allocation of 4 tasks: .*srun python evaluate"):
        run("label=x")
    assert not (tmp_path / "out").exists()


def test_changed_pictures_and_another_judge_are_scored_anew(run: Run, out: Path, tmp_path: Path) -> None:
    before = read(out / "x/scores.json")
    Image.new("RGB", (16, 16), "red").save(out / "x/pictures/picture1_0.png")
    run("label=x", "generate=false")
    changed = read(out / "x/scores.json")
    assert changed["pictures"] != before["pictures"]
    assert changed["per_item"]["clip_i"]["picture1"] != before["per_item"]["clip_i"]["picture1"]

    other = tiny.save_clip(tmp_path / "other", seed=5)
    run("label=x", "generate=false", f"judge.name={other}")
    assert read(out / "x/scores.json")["per_item"]["clip_i"] != changed["per_item"]["clip_i"]
    run("label=x", "generate=false", "judge.name=local-dir:nowhere")  # the old scores are another judge's
    scores = read(out / "x/scores.json")
    assert "nowhere" in scores["missing"]["clip"] and not scores["metrics"] and not scores["per_item"]
    run("label=x", "generate=false")
    assert read(out / "x/scores.json")["per_item"]["clip_i"] == changed["per_item"]["clip_i"]


def test_metrics_that_cannot_be_computed_are_noted(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Sets that are too small, and a network that is missing: the hub is asked once, before the first image."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    said, make_images = [], module.generate
    monkeypatch.setattr(module, "generate", lambda *given: [said.append(caplog.text), make_images(*given)])

    for _ in range(2):
        more = ["+metric@metrics.fid_judge=fid_judge", "+metric@metrics.other=dinov2"]
        out = run("label=x", "benchmark.limit=1", "num_seeds=1", *more)

    assert said[1].count("127.0.0.1:9 does not answer") == 1 and "other will be missing: network.path=" in said[0]
    scores = read(out / "x/scores.json")
    assert "facebook/dinov2-base" in scores["missing"]["other"] and "clip_i" in scores["metrics"]
    assert "sets of two or more, not 1 with 1" in scores["missing"]["fid_judge"]


def test_missing_weights_end_as_skipped(
    run: Run, evaluated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = run("label=x", "method.base=nowhere/at/all")
    manifest = read(out / "x/manifest.json")
    assert manifest["status"] == "skipped" and manifest["method"]["name"] == "IP-Adapter"
    assert "method.base=nowhere/at/all" in manifest["reason"]
    run("label=x")  # once they are there it runs
    assert pictures(out / "x") == pictures(evaluated / "x")
    run("label=x", "method.base=nowhere/at/all")
    assert read(out / "x/manifest.json")["status"] == "complete" and "generate=false" in caplog.text


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
def test_labels_have_the_options_that_change_pictures(overrides: list[str], label: str) -> None:
    assert module.label_of(compose(*overrides)) == label


def evaluate_alone(overrides: list[str]) -> None:
    torch.set_num_threads(1)
    os.setsid()
    evaluate(compose(*overrides))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["unet", "flux", "chroma", "sd3"])
def test_kills_leave_no_trace(family: str, prompts: Path, adapter: Path, clip_name: str, tmp_path: Path) -> None:
    """Kill -9 at random moments of the generation; then the pictures are those of a run in one go."""
    if family != "unet":
        adapter = make_flow_adapter(family, clip_name, tmp_path)
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
