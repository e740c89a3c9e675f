"""What a run leaves behind, and that only the adapter is in it."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from bystanders import WITNESS, Witness
from conftest import (
    HELDOUT,
    QUIET,
    Run,
    World,
    checkpoint,
    column,
    compose,
    rows,
    saved_configuration,
)
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ipa.export.loading import load_model
from ipa.training.checkpointing import read_checkpoint
from ipa.training.parts import build_model, check_parts

BRANCHES = range(1, 2 * len(tiny.HIDDEN), 2)
PUBLISHED = {
    "image_proj.proj.weight": (4 * tiny.CONTEXT_WIDTH, tiny.POOLED_WIDTH),
    "image_proj.proj.bias": (4 * tiny.CONTEXT_WIDTH,),
    "image_proj.norm.weight": (tiny.CONTEXT_WIDTH,),
    "image_proj.norm.bias": (tiny.CONTEXT_WIDTH,),
    **{
        f"ip_adapter.{number}.to_{kind}_ip.weight": (width, tiny.CONTEXT_WIDTH)
        for number, width in zip(BRANCHES, tiny.HIDDEN, strict=True)
        for kind in "kv"
    },
}


def test_run_folder_holds_everything_and_nothing_else(finished: Path) -> None:
    found = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert found == {
        *("config.yaml", "log.csv", "summary.json", "adapter.safetensors"),
        *("checkpoints/step_00000002.ckpt", "checkpoints/step_00000004.ckpt"),
        *("previews/step_000002.png", "previews/step_000004.png"),
    }
    assert "${" not in (finished / "config.yaml").read_text()
    assert saved_configuration(finished).callbacks.export.path == f"{finished}/adapter.safetensors"


def test_log_has_every_step_and_previews_are_scored_grids(finished: Path) -> None:
    """Three prompts; the prompt, three scales, and one with a text."""
    assert [row["step"] for row in rows(finished)] == ["1", "2", "3", "4"]
    assert [0 < float(loss) < 10 for loss in column(finished, "train/loss").values()] == [True] * 4
    assert all(float(speed) > 0 for speed in column(finished, "train/samples_per_s").values())
    for score in ("clip_i", "clip_t", "retrieval_at_1", "border_lab"):
        assert list(column(finished, f"preview/{score}")) == [2, 4]
    cell, gap, header = 96, 4, 18
    with Image.open(finished / "previews/step_000004.png") as grid:
        assert grid.size == (5 * (cell + gap) + gap, 3 * (cell + gap) + gap + header)
        first = [grid.crop((gap + x * 100, header + gap, x * 100 + 100, header + 100)) for x in range(5)]
    assert len({picture.tobytes() for picture in first}) == 5


def test_checkpoint_holds_the_trainable_set_alone(finished: Path) -> None:
    saved = checkpoint(finished)
    shapes = sorted(tuple(tensor.shape) for tensor in saved["state_dict"].values())
    moments = [state["exp_avg"] for state in saved["optimizer_states"][0]["state"].values()]

    assert all(name.startswith("trainable.") for name in saved["state_dict"])
    assert shapes == sorted(PUBLISHED.values())
    assert sorted(tuple(moment.shape) for moment in moments) == shapes
    assert saved["global_step"] == 4


def test_adapter_file_has_the_published_layout_and_the_trained_weights(finished: Path, world: World) -> None:
    with safe_open(finished / "adapter.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == PUBLISHED
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    expected = {"base": "base", "encoder": "local-dir:clip", "head": "global", "kind": "decoupled", "step": "4"}
    assert metadata.items() >= (expected | {"sampling_guidance": "4.0", "sampling_num_steps": "1"}).items()
    assert load_model(finished).family.source == world.base  # found in the run
    trained = checkpoint(finished)["state_dict"]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, trained[f"trainable.{internal(name)}"].half())
    pipeline = StableDiffusionPipeline.from_pretrained(world.base)
    pipeline.load_ip_adapter(str(finished), subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None)
    projection = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    assert torch.equal(projection.image_embeds.weight, tensors["image_proj.proj.weight"].float())


def internal(name: str) -> str:
    """The name of a tensor in the model by that in the file."""
    part, number, *rest = name.split(".")
    return name if part == "image_proj" else ".".join(["ip_adapter.branches", str(int(number) // 2), *rest])


def test_a_no_image_that_diffusers_does_not_read_is_logged_at_the_start(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for options in ([], ["adapter.layout=ipa", "tokens.no_image=blank"]):
        check_parts(compose(tmp_path, *world.overrides(), *options))
    assert "no_image" not in caplog.text
    check_parts(compose(tmp_path, *world.overrides(), "tokens.no_image=blank"))
    assert "tokens.no_image=blank" in caplog.text and "ip_adapter_image_embeds=" in caplog.text


def test_summary_is_plain_json_with_the_scores(finished: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    summary = json.loads((finished / "summary.json").read_text(), parse_constant=refuse)

    assert summary["steps"] == 4
    assert summary["parameters trained"] == sum(torch.Size(shape).numel() for shape in PUBLISHED.values())
    assert summary["samples per second"] > 0
    assert summary["last preview"] == str(finished / "previews/step_000004.png")
    scores = {step: float(score) for step, score in column(finished, "preview/clip_i").items()}
    best = max(scores, key=scores.__getitem__)
    assert summary["best checkpoint"] == str(finished / f"checkpoints/step_{best:08d}.ckpt")
    assert read_checkpoint(Path(summary["best checkpoint"]))["global_step"] == best
    assert set(summary["scores"]) == {"scale 0", "scale 1"}
    assert set(summary["scores"]["scale 1"]) == {"clip_i", "clip_t", "retrieval_at_1", "border_lab"}


def test_the_last_step_counts_always_and_there_may_be_fewer_held_out_images_than_configured(
    train_in: Run, tmp_path: Path
) -> None:
    more = (f"preview.num_prompts={HELDOUT + 3}", f"scoring.num_prompts={HELDOUT + 3}", "trainer.max_steps=1")
    folder = train_in(tmp_path / "odd", *more, "trainer.log_every_n_steps=10")

    assert [path.name for path in (folder / "previews").iterdir()] == ["step_000001.png"]
    assert checkpoint(folder)["global_step"] == 1
    with safe_open(folder / "adapter.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "1"
    assert list(column(folder, "preview/clip_i")) == [1]
    assert json.loads((folder / "summary.json").read_text())["samples per second"] > 0
    with Image.open(folder / "previews/step_000001.png") as grid:
        assert grid.height == HELDOUT * 100 + 4 + 18


@pytest.mark.parametrize("missing", [pytest.param(["data.val=null"], marks=pytest.mark.slow), ["judge=null"]])
def test_without_held_out_pictures_or_judge_the_rest_is_there(
    train_in: Run, tmp_path: Path, missing: list[str]
) -> None:
    folder = train_in(tmp_path / "bare", "trainer.max_steps=2", "preview.num_prompts=1", *missing)

    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000002.ckpt"]
    assert (folder / "adapter.safetensors").is_file()
    assert (folder / "previews").is_dir() == (missing == ["judge=null"])
    assert not json.loads((folder / "summary.json").read_text()).get("scores")


def test_an_epsilon_base_trains_with_its_own_target_and_stays_as_it_is(
    train_in: Run, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its hash after a step is that before. Without a terminal the progress of a short run is one line."""
    caplog.set_level("INFO", "ipa")
    base = tmp_path / "base"
    tiny.make_pipeline(tiny.make_family("epsilon")).save_pretrained(base)

    folder = train_in(tmp_path / "epsilon", *QUIET, f"base.path={base}", "trainer.max_steps=1", WITNESS)

    assert column(folder, "train/loss")[1] != column(finished, "train/loss")[1]
    assert Witness.module.model.frozen_hash() == build_model(saved_configuration(folder)).frozen_hash()
    [line] = [message for message in caplog.messages if message.startswith("step ")]
    assert re.fullmatch(r"step 1 of 1  loss 0\.\d+  samples/s [\d.]+", line)


def test_same_seed_gives_the_same_adapter_and_another_seed_another(
    train_in: Run, tmp_path: Path, finished: Path
) -> None:
    again = train_in(tmp_path / "again", *QUIET, "data.num_workers=2")
    other = train_in(tmp_path / "other", *QUIET, "seed=2", "trainer.max_steps=1")

    first, second, third = (load_file(folder / "adapter.safetensors") for folder in (finished, again, other))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert not torch.equal(third["image_proj.proj.weight"], first["image_proj.proj.weight"])
