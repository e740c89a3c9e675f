"""`python -m ipa.tools.sample`: an image from an adapter file, or one line that says what is wrong."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flow
import tiny_sdxl
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image, ImageChops, ImageFont

from ipa.data.images.transforms import FITS
from ipa.errors import UserError
from ipa.export.storage import load_adapter, save_adapter
from ipa.prompter import Prompter
from ipa.sampling import SamplingOptions
from ipa.tools import sample as sample_tool
from ipa.tools.pictures import GAP_PX, LABEL_PX, write_picture
from ipa.tools.pipelines import make_pipeline
from ipa.tools.sample import main

ROOT = Path(__file__).resolve().parents[2]

Command = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, clip_name: str) -> Path:
    """An adapter file whose metadata names its base and encoder."""
    path = tmp_path_factory.mktemp("trained") / "adapter.safetensors"
    tiny.write_adapter(path, {"base": str(base_folder), "encoder": clip_name})
    return path


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copy(trained, tmp_path))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture(scope="module")
def loaded() -> dict[Any, Prompter]:
    """Loading takes longer than sampling, so what was loaded serves all tests."""
    return {}


@pytest.fixture
def sample(
    adapter: Path, image: Path, command: Command, loaded: dict[Any, Prompter], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Run the command in this process with options that work, some of them replaced; returns its output."""
    load = sample_tool.load

    def load_once(settings: dict[str, Any], device: str | None) -> Prompter:
        files = [path / adapter.name if (path := Path(each)).is_dir() else path for each in settings["adapter"]]
        contents = [file.read_bytes() if file.is_file() else file for file in files]
        key = (device, *contents, *(settings[name] for name in ("base", "encoder", "encoder_weights", "dtype")))
        if key not in loaded:
            loaded[key] = load(settings, device)
        return loaded[key]

    def run(**changed: object) -> str:
        out = image.with_name("out.png")
        options = {"adapter": adapter, "image": image, "out": out, "num_steps": 2, "scale": 0.5} | changed
        return command(main, **{name: value for name, value in options.items() if value is not None})

    monkeypatch.setattr(sample_tool, "load", load_once)
    return run


@pytest.fixture
def refused(sample: Command, tmp_path: Path) -> Command:
    """Run the command, which must fail with one line and write nothing; returns the line."""

    def run(**changed: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as caught:
            sample(**changed)
        assert isinstance(caught.value.code, str)  # printed to stderr, exit code 1
        assert "\n" not in caught.value.code
        assert sorted(tmp_path.rglob("*")) == before
        return caught.value.code

    return run


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def test_options_reach_the_image(sample: Command, image: Path, tmp_path: Path) -> None:
    changes = [{}, {"seed": 1}, {"text": "abc"}, {"scale": 1}, {"scale": 0}, {"guidance": 1}, {"num_steps": 3}]
    changes += [{"guidance_rescale": 0.7}, {"width": 24, "height": 24}]
    changes += [{"embeds_scaling": "K+V"}, {"tiles": True}, {"subtract_text": "cat"}]
    other = image.with_name("other.png")
    Image.effect_noise((30, 20), 80).convert("RGB").save(other)
    changes += [{"image": f"[{image}, {other}]"}, {"image": other}]
    for number, changed in enumerate(changes):
        sample(out=tmp_path / f"{number}.png", **changed)
    again = sample(out=tmp_path / "again.png", image=f"[{image}]", device="cpu")
    assert again == f"wrote {tmp_path}/again.png\n"

    made = [pixels(tmp_path / f"{number}.png") for number in range(len(changes))]
    assert len(set(made)) == len(changes)
    assert pixels(tmp_path / "again.png") == made[0]
    with Image.open(tmp_path / "0.png") as default, Image.open(tmp_path / "8.png") as small:
        assert (default.format, default.mode, default.size) == ("PNG", "RGB", (tiny.IMAGE_PX, tiny.IMAGE_PX))
        assert small.size == (24, 24)


@pytest.mark.parametrize("across", ["seed", "adapter"])
def test_lists_make_a_labelled_grid_of_the_single_images(
    sample: Command, adapter: Path, tmp_path: Path, across: str
) -> None:
    tensors, metadata = load_adapter(adapter)
    other = tmp_path / "other.safetensors"
    save_adapter(other, {name: 1.5 * each for name, each in tensors.items()}, metadata)
    rows, columns = ([0, 0.5, 1], [1, 2]) if across == "seed" else ([0.5], [adapter, other])
    listed = {across: f"[{','.join(map(str, columns))}]", **({"scale": rows} if len(rows) > 1 else {})}
    sample(**listed, out=tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        sheet = picture.convert("RGB")
    names = [f"seed {seed}" for seed in columns] if across == "seed" else [adapter.parent.name, other.stem]
    lengths = [int(ImageFont.load_default(LABEL_PX).getlength(name)) for name in names]
    pitch = GAP_PX + max(tiny.IMAGE_PX, *lengths)  # no label is cut
    corner = sheet.width - len(columns) * pitch + GAP_PX
    for y, scale in enumerate(rows):
        for x, value in enumerate(columns):
            sample(scale=scale, **{across: value}, out=tmp_path / "one.png")
            left, top = corner + x * pitch, LABEL_PX + GAP_PX + y * (tiny.IMAGE_PX + GAP_PX)
            cell = sheet.crop((left, top, left + tiny.IMAGE_PX, top + tiny.IMAGE_PX))
            with Image.open(tmp_path / "one.png") as one:
                assert ImageChops.difference(cell, one).getextrema() <= ((0, int(across == "seed")),) * 3


def test_a_folder_gives_an_image_for_each_picture_and_resumes(sample: Command, image: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "prompts", tmp_path / "made"
    (folder / "c.png").mkdir(parents=True)
    for name, colour in (("a.png", "teal"), ("a.jpg", "white"), ("z.png", "red")):
        Image.new("RGB", (30, 20), colour).save(folder / name)
    for name in ("._a.png", "b.png"):
        (folder / name).write_bytes(b"no picture")

    def refused() -> dict[str, bytes]:
        with pytest.raises(SystemExit, match=rf"image={folder}/b.png cannot be read .*\nwrote the others to {out}$"):
            sample(image=folder, out=out)
        return {path.name: path.read_bytes() for path in out.iterdir()}

    first = refused()
    (out / "z.png").unlink()
    kept = (out / "a.png.png").stat().st_mtime_ns

    assert sorted(first) == ["a.jpg.png", "a.png.png", "z.png"] and len(set(first.values())) == 3
    assert refused() == first and (out / "a.png.png").stat().st_mtime_ns == kept
    sample(out=tmp_path / "single.png")  # image is teal, too
    assert pixels(tmp_path / "single.png") == pixels(out / "a.png.png")
    with pytest.raises(SystemExit, match="give another one"):
        sample(image=folder, out=folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"scale": "much"}, "scale=much"), ({"num_steps": -5}, "num_steps=-5"), ({"text": None}, "text=None")],
    ids=str,
)
def test_settings_of_a_foreign_png_are_checked(
    refused: Command, image: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = tmp_path / "foreign.png"
    write_picture(Image.open(image), path, {"image": [str(image)], **changes})

    assert words in refused(again=path, num_steps=None, scale=None)


def test_a_png_does_not_say_where_to_write(sample: Command, image: Path, tmp_path: Path) -> None:
    elsewhere, foreign = tmp_path / "elsewhere.png", tmp_path / "foreign.png"
    write_picture(Image.open(image), foreign, {"out": str(elsewhere), "device": "abacus"})
    with contextlib.chdir(tmp_path):
        sample(again=foreign, out=None, device=None)

    assert (tmp_path / "picture.png").is_file() and not elsewhere.exists()


def test_an_image_is_made_again_from_its_settings(sample: Command, tmp_path: Path) -> None:
    sample(seed=4, text="abc", blocks="ease in", out=tmp_path / "first.png")
    nothing = dict.fromkeys(["adapter", "image", "num_steps", "scale"])
    sample(**nothing, again=tmp_path / "first.png", out=tmp_path / "again.png")
    sample(**nothing, again=tmp_path / "first.png", out=tmp_path / "other.png", seed=5)

    assert pixels(tmp_path / "again.png") == pixels(tmp_path / "first.png") != pixels(tmp_path / "other.png")


def test_references_have_their_own_options(sample: Command, image: Path, tmp_path: Path) -> None:
    Image.new("L", (tiny.IMAGE_PX, tiny.IMAGE_PX)).save(tmp_path / "black.png")
    masked = f"[{{images: {image}, mask: {tmp_path / 'black.png'}}}]"
    sample(references=masked, out=tmp_path / "masked.png")
    sample(scale=0, out=tmp_path / "none.png")
    sample(references=f"[{{images: {image}, scale: 0.5}}]", out=tmp_path / "half.png")
    sample(out=tmp_path / "same.png")

    assert pixels(tmp_path / "masked.png") == pixels(tmp_path / "none.png")
    assert pixels(tmp_path / "half.png") == pixels(tmp_path / "same.png") != pixels(tmp_path / "none.png")


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "chroma", "sd3"])
def test_pipelines_and_schedulers_of_every_base(name: str, image: Path, tmp_path: Path) -> None:
    """They start from images and inpaint as far as diffusers can; what they cannot is refused by name."""
    unets = {"sd": tiny.make_family, "sdxl": tiny_sdxl.make_family}
    model = tiny.make_model(family=unets[name]()) if name in unets else tiny_flow.make_model(tiny_flow.MAKERS[name])
    model.adapter.install()
    black, control = image.with_name("black.png"), {"control": image, "control_model": tmp_path / "control"}
    Image.new("RGB", (30, 20)).save(black)
    inpaint, scheduler = {"start_image": image, "inpaint": image}, "EulerDiscreteScheduler"
    prompter, ways = Prompter([model]), [{}, *({"start_image": start, "strength": 0.5} for start in (image, black))]
    refusals = [("num_steps", {"num_steps": 1, "scheduler": "PNDMScheduler"})]
    if name == "sd":
        controlnet = ControlNetModel.from_unet(model.family.unet, conditioning_embedding_out_channels=(4, 8))
        for parameter in controlnet.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        controlnet.save_pretrained(tmp_path / "control")
        ways += [inpaint, control, {"scheduler": scheduler}]
    elif name not in unets:
        ways += [inpaint] if name == "flux" else []  # the tiny SD3 has too few channels
        ways += [{"scheduler": "FlowMatchLCMScheduler"}]
        refusals = [("scheduler", {"scheduler": each}) for each in (scheduler, "FlowMatchHeunDiscreteScheduler")]
        refusals += [("control_model", control), *[("inpaint", inpaint)] * (name == "chroma")]
    images = []
    for way in ways:
        pipeline, arguments = make_pipeline(prompter, num_steps=4, **way)
        images += prompter(image, "cat", seed=1, num_steps=4, pipeline=pipeline, arguments=arguments)

    assert len({each.tobytes() for each in images}) == len(ways)
    for option, way in refusals:
        with pytest.raises(UserError, match=f"{option}="):
            make_pipeline(prompter, **{"num_steps": 4, **way})


def test_another_model_is_no_control(refused: Command, image: Path, base_folder: Path) -> None:
    message = refused(control=image, control_model=base_folder / "unet")

    assert "is no ControlNet or T2I-Adapter" in message and "UNet2DConditionModel" in message


def test_a_t2i_adapter_cannot_start_from_an_image(refused: Command, image: Path, tmp_path: Path) -> None:
    T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2).save_pretrained(tmp_path / "t2i")

    assert "start_image=: diffusers" in refused(control=image, control_model=tmp_path / "t2i", start_image=image)


def test_the_image_prompt_is_preprocessed_as_the_metadata_say(sample: Command, adapter: Path, tmp_path: Path) -> None:
    Image.effect_noise((60, 20), 80).convert("RGB").save(tmp_path / "wide.png")
    tensors, metadata = load_adapter(adapter)
    made = []
    for words in ({}, {"preprocessing": FITS["crop"].words}, {"preprocessing": FITS["pad"].words}):
        save_adapter(adapter, tensors, {name: metadata[name] for name in metadata if name != "preprocessing"} | words)
        sample(image=tmp_path / "wide.png", scale=1)
        made.append(pixels(tmp_path / "out.png"))

    assert made[0] == made[1] != made[2]


def test_steps_and_guidance_are_the_trainings(sample: Command, adapter: Path, tmp_path: Path) -> None:
    """Recorded in the metadata; else guidance is the base's usual one. A run folder means its adapter."""
    made = {}
    run = tmp_path / "run"
    save_adapter(run / adapter.name, *load_adapter(adapter))
    recorded = load_adapter(adapter)[1] | SamplingOptions(num_steps=3, guidance=1.0).describe()
    save_adapter(adapter, load_adapter(adapter)[0], recorded)
    cases: dict[str, dict[str, object]] = {
        "recorded": {"num_steps": None},
        "same": {"adapter": run, "num_steps": 3, "guidance": 1},
        "usual": {"adapter": run},
        "same as usual": {"adapter": run, "guidance": 7.5},
    }
    for name, options in cases.items():
        sample(out=tmp_path / f"{name}.png", **options)
        made[name] = pixels(tmp_path / f"{name}.png")

    assert made["recorded"] == made["same"] != made["usual"] == made["same as usual"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"imgae": "x.png"}, ["Did you mean image=…? 'imgae=x.png' is not one of the options that --help lists"]),
        ({"adapter": None}, ["please give adapter=…"]),
        ({"image": None}, ["image=[]", "at least one image prompt"]),
        ({"keep_outside": "true"}, ["keep_outside=true", "give mask="]),
        ({"text": "[]"}, ["text=[]", "at least one"]),
        ({"seed": "[]"}, ["seed=[]", "at least one"]),
        ({"seed": 2**64}, ["seed=18446744073709551616", "at most"]),
        ({"start_image": __file__, "strength": 0.1}, ["strength=0.1 num_steps=2"]),
        ({"references": "[{images: a.png]"}, ["is not YAML"]),
        ({"references": "[{images: a.png, 5: 1}]"}, ["5 is none of"]),
        ({"num_steps": 0}, ["num_steps=0", "at least 1"]),
        ({"width": 25}, ["width=25", "multiples of 2 px"]),
        ({"references": "[{image: a}]"}, ["references=[{image: a}]", "images"]),
        ({"references": "[{images: a, lambda: 1}]"}, ["lambda", "scale"]),
        ({"control": "edges.png"}, ["control_model="]),
        ({"inpaint": "mask.png"}, ["start_image="]),
        ({"scheduler": "Euler"}, ["scheduler=Euler", "EulerDiscreteScheduler"]),
        ({"scheduler": "SchedulerMixin"}, ["scheduler=SchedulerMixin", "EulerDiscreteScheduler"]),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, ["for other pipelines"]),
        ({"again": "nowhere.png"}, ["again=nowhere.png", "no such file"]),
        ({"device": "abacus"}, ["device=abacus"]),
        ({"adapter": "nowhere.safetensors"}, ["adapter=nowhere.safetensors"]),
        ({"encoder_weights": "x"}, ["encoder.pretrained=x"]),
        ({"dtype": "int7"}, ["dtype=int7", "bfloat16"]),
        ({"image": "nowhere.png"}, ["image=nowhere.png"]),
        ({"base": "./nowhere"}, ["base.path=./nowhere"]),
        ({"encoder": "local-dir:nowhere"}, ["encoder.name=local-dir:nowhere"]),
        ({"out": "picture"}, ["out=picture", ".png"]),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_in_one_line(refused: Command, changed: dict[str, object], expected: list[str]) -> None:
    message = refused(**changed)

    assert message.startswith("tool: ")
    for words in expected:
        assert words in message


def run_module(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "ipa.tools.sample", *arguments]
    env = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.mark.slow
def test_the_console_of_the_command_shows_only_its_own_output(adapter: Path, image: Path, tmp_path: Path) -> None:
    result = run_module(tmp_path, f"adapter={adapter}", f"image={image}", "num_steps=2", "out=a.png")

    assert result.returncode == 0, result.stderr
    assert result.stdout == "wrote a.png\n"
    assert [line for line in result.stderr.splitlines() if not line.startswith("import time")] == []


def test_a_misspelled_option_is_refused_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    result = run_module(tmp_path, "imgae=x")
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time")]
    imported = {line.rpartition("|")[2].strip() for line in lines}

    assert result.returncode == 1
    assert "omegaconf" in imported
    assert not imported & {"torch", "diffusers", "transformers", "open_clip", "lightning"}
