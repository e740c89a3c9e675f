"""`python -m ipa.tools.sample`: an image from an adapter file, or one line that says what is wrong."""

import contextlib
import functools
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
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image, ImageChops, ImageFont
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ipa.data.images.transforms import FITS
from ipa.errors import UserError
from ipa.export.published import to_published, with_metadata
from ipa.export.storage import load_adapter, save_adapter
from ipa.prompter import Prompter
from ipa.sampling import SamplingOptions
from ipa.tools import sample as sample_tool
from ipa.tools.pictures import GAP_PX, LABEL_PX, write_picture
from ipa.tools.pipelines import make_pipeline
from ipa.tools.sample import main

ROOT = Path(__file__).resolve().parents[2]

Sample = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, clip_name: str) -> Path:
    """An adapter file whose metadata names its base and encoder."""
    torch.manual_seed(0)
    tensors = to_published(tiny.shake(tiny.make_model()).trainable.state_dict())
    path = tmp_path_factory.mktemp("trained") / "adapter.safetensors"
    save_adapter(path, tensors, {"format": "ip-adapter", "base": str(base_folder), "encoder": clip_name})
    return path


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copy(trained, tmp_path))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def sample(adapter: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sample:
    """Run the command in this process with options that work, some of them replaced; returns its output."""

    def run(**changed: object) -> str:
        out = image.with_name("out.png")
        options = {"adapter": adapter, "image": image, "out": out, "num_steps": 2, "scale": 0.5} | changed
        words = [f"{name}={value}" for name, value in options.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["sample", *words])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests with several samples of the same adapters: the models are loaded once."""
    load = functools.cache(lambda *paths: Prompter.load(paths))
    monkeypatch.setattr(sample_tool, "load", lambda settings, device: load(*settings["adapter"]))


@pytest.fixture
def refused(sample: Sample, tmp_path: Path) -> Sample:
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


@pytest.mark.usefixtures("loaded_once")
def test_options_reach_the_image(sample: Sample, tmp_path: Path) -> None:
    changes = [{}, {"seed": 1}, {"text": "abc"}, {"scale": 1}, {"scale": 0}, {"guidance": 1}, {"num_steps": 3}]
    changes += [{"guidance_rescale": 0.7}, {"width": 24, "height": 24}]
    changes += [{"embeds_scaling": "K+V"}, {"tiles": True}, {"subtract_text": "cat"}]
    for number, changed in enumerate(changes):
        sample(out=tmp_path / f"{number}.png", **changed)
    assert sample(out=tmp_path / "again.png", device="cpu") == f"wrote {tmp_path}/again.png\n"

    made = [pixels(tmp_path / f"{number}.png") for number in range(len(changes))]
    assert len(set(made)) == len(changes)
    assert pixels(tmp_path / "again.png") == made[0]
    with Image.open(tmp_path / "0.png") as default, Image.open(tmp_path / "8.png") as small:
        assert (default.format, default.mode, default.size) == ("PNG", "RGB", (tiny.IMAGE_PX, tiny.IMAGE_PX))
        assert small.size == (24, 24)


@pytest.mark.usefixtures("loaded_once")
def test_several_images_and_several_image_prompts(sample: Sample, image: Path, tmp_path: Path) -> None:
    other = image.with_name("other.png")
    Image.effect_noise((30, 20), 80).convert("RGB").save(other)
    prompts = {"one": image, "list": f"[{image}]", "two": f"[{image}, {other}]", "other": other}
    for name, prompt in prompts.items():
        sample(image=prompt, out=tmp_path / f"made_{name}.png")
    made = {name: pixels(tmp_path / f"made_{name}.png") for name in prompts}
    assert made["one"] == made["list"]
    assert len(set(made.values())) == 3


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("across", ["seed", "adapter"])
def test_lists_make_a_labelled_grid_of_the_single_images(
    sample: Sample, adapter: Path, tmp_path: Path, across: str
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


@pytest.mark.usefixtures("loaded_once")
def test_a_folder_gives_an_image_for_each_and_resumes(sample: Sample, image: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "prompts", tmp_path / "made"
    folder.mkdir()
    for name, colour in (("a", "teal"), ("b", "red")):
        Image.new("RGB", (30, 20), colour).save(folder / f"{name}.png")
    sample(image=folder, out=out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "b.png").unlink()
    kept = (out / "a.png").stat().st_mtime_ns
    sample(image=folder, out=out)

    assert sorted(first) == ["a.png", "b.png"] and first["a.png"] != first["b.png"]
    assert (out / "b.png").read_bytes() == first["b.png"] and (out / "a.png").stat().st_mtime_ns == kept
    sample(out=tmp_path / "single.png")  # image is teal, too
    assert pixels(tmp_path / "single.png") == pixels(out / "a.png")


def test_a_folder_is_made_but_for_what_is_no_picture(sample: Sample, image: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "prompts", tmp_path / "made"
    (folder / "c.png").mkdir(parents=True)
    for name in ("a.png", "a.jpg", "z.png"):
        Image.open(image).save(folder / name)
    for name in ("._a.png", "b.png"):
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(
        SystemExit, match=rf"^sample: image={folder}/b.png cannot be read .*\nwrote the others to {out}$"
    ):
        sample(image=folder, out=out)

    assert sorted(path.name for path in out.iterdir()) == ["a.jpg.png", "a.png.png", "z.png"]
    with pytest.raises(SystemExit, match="give another one"):
        sample(image=folder, out=folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"scale": "much"}, "scale=much"), ({"num_steps": -5}, "num_steps=-5"), ({"text": None}, "text=None")],
    ids=str,
)
def test_settings_of_a_foreign_png_are_checked(
    refused: Sample, image: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = tmp_path / "foreign.png"
    write_picture(Image.open(image), path, {"image": [str(image)], **changes})

    assert words in refused(again=path, num_steps=None, scale=None)


def test_a_png_does_not_say_where_to_write(sample: Sample, image: Path, tmp_path: Path) -> None:
    elsewhere, foreign = tmp_path / "elsewhere.png", tmp_path / "foreign.png"
    write_picture(Image.open(image), foreign, {"out": str(elsewhere), "device": "abacus"})
    with contextlib.chdir(tmp_path):
        sample(again=foreign, out=None, device=None)

    assert (tmp_path / "picture.png").is_file() and not elsewhere.exists()


@pytest.mark.usefixtures("loaded_once")
def test_an_image_is_made_again_from_its_settings(sample: Sample, tmp_path: Path) -> None:
    sample(seed=4, text="abc", blocks="ease in", out=tmp_path / "first.png")
    nothing = dict.fromkeys(["adapter", "image", "num_steps", "scale"])
    sample(**nothing, again=tmp_path / "first.png", out=tmp_path / "again.png")
    sample(**nothing, again=tmp_path / "first.png", out=tmp_path / "other.png", seed=5)

    assert pixels(tmp_path / "again.png") == pixels(tmp_path / "first.png") != pixels(tmp_path / "other.png")


@pytest.mark.usefixtures("loaded_once")
def test_references_have_their_own_options(sample: Sample, image: Path, tmp_path: Path) -> None:
    Image.new("L", (tiny.IMAGE_PX, tiny.IMAGE_PX)).save(tmp_path / "black.png")
    masked = f"[{{images: {image}, mask: {tmp_path / 'black.png'}}}]"
    sample(references=masked, out=tmp_path / "masked.png")
    sample(scale=0, out=tmp_path / "none.png")
    sample(references=f"[{{images: {image}, scale: 0.5}}]", out=tmp_path / "half.png")
    sample(out=tmp_path / "same.png")

    assert pixels(tmp_path / "masked.png") == pixels(tmp_path / "none.png")
    assert pixels(tmp_path / "half.png") == pixels(tmp_path / "same.png") != pixels(tmp_path / "none.png")


@pytest.mark.usefixtures("loaded_once")
def test_other_pipelines_and_schedulers(sample: Sample, image: Path, base_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(base_folder, subfolder="unet")
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    for parameter in controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    controlnet.save_pretrained(tmp_path / "control")
    ways: list[dict[str, object]] = [
        {},
        {"start_image": image},
        {"start_image": image, "strength": 0.5},
        {"start_image": image, "inpaint": image},
        {"control": image, "control_model": tmp_path / "control"},
        {"scheduler": "EulerDiscreteScheduler"},
    ]
    for number, way in enumerate(ways):
        sample(out=tmp_path / f"{number}.png", num_steps=4, **way)

    assert len({pixels(tmp_path / f"{number}.png") for number in range(len(ways))}) == len(ways)
    with pytest.raises(SystemExit, match="scheduler=PNDMScheduler cannot make num_steps=1"):
        sample(out=tmp_path / "x.png", num_steps=1, scheduler="PNDMScheduler")


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "chroma", "sd3"])
def test_images_start_from_the_start_image(name: str, image: Path) -> None:
    unets = {"sd": tiny.make_family, "sdxl": tiny_sdxl.make_family}
    model = tiny.make_model(family=unets[name]()) if name in unets else tiny_flow.make_model(tiny_flow.MAKERS[name])
    prompter, made = Prompter([model]), []
    model.adapter.install()
    for colour in ("black", "white"):
        start = image.with_name(f"{colour}.png")
        Image.new("RGB", (30, 20), colour).save(start)
        pipeline, arguments = make_pipeline(prompter, num_steps=4, start_image=start, strength=0.3)
        made += prompter(image, num_steps=4, pipeline=pipeline, arguments=arguments)

    assert made[0].tobytes() != made[1].tobytes()


@pytest.mark.parametrize("name", ["flux", "chroma", "sd3"])
def test_pipelines_of_transformers(name: str, image: Path) -> None:
    """They start from images and inpaint as far as diffusers can; what they cannot is refused by name."""
    model = tiny_flow.make_model(tiny_flow.MAKERS[name])
    model.adapter.install()
    prompter, ways = Prompter([model]), [{}, {"start_image": image, "strength": 0.5}]
    ways += [{"start_image": image, "inpaint": image}] if name == "flux" else []  # the tiny SD3 has too few channels
    ways += [{"scheduler": "FlowMatchLCMScheduler"}]
    images = []
    for way in ways:
        pipeline, arguments = make_pipeline(prompter, num_steps=4, **way)
        images += prompter(image, "cat", seed=1, num_steps=4, pipeline=pipeline, arguments=arguments)

    assert len({each.tobytes() for each in images}) == len(ways)
    refusals = [("scheduler", {"scheduler": "EulerDiscreteScheduler"})]
    refusals += [("scheduler", {"scheduler": "FlowMatchHeunDiscreteScheduler"})]
    refusals += [("control_model", {"control": image, "control_model": "x"})]
    refusals += [("inpaint", {"start_image": image, "inpaint": image})] if name == "chroma" else []
    for option, way in refusals:
        with pytest.raises(UserError, match=f"{option}="):
            make_pipeline(prompter, num_steps=4, **way)


def test_another_model_is_no_control(refused: Sample, image: Path, base_folder: Path) -> None:
    message = refused(control=image, control_model=base_folder / "unet")

    assert "is no ControlNet or T2I-Adapter" in message and "UNet2DConditionModel" in message


def test_the_image_prompt_is_preprocessed_as_the_metadata_say(sample: Sample, adapter: Path, tmp_path: Path) -> None:
    Image.effect_noise((60, 20), 80).convert("RGB").save(tmp_path / "wide.png")
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata()
    ways = {name: metadata | {"preprocessing": way.words} for name, way in FITS.items()} | {"plain": metadata}
    made = {}
    for name, content in ways.items():
        save_file(load_file(adapter), adapter, content)
        sample(image=tmp_path / "wide.png", out=tmp_path / f"{name}.png", scale=1)
        made[name] = pixels(tmp_path / f"{name}.png")

    assert len(set(made.values())) == len(FITS) == 3
    assert made["plain"] == made["crop"]


def test_steps_and_guidance_are_the_trainings(sample: Sample, adapter: Path, tmp_path: Path) -> None:
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
    ("head", "kind", "extension"),
    [
        ("global", "simple", ".safetensors"),
        ("fine_grained", "decoupled", ".bin"),
        ("full", "decoupled", ".safetensors"),
    ],
)
def test_heads_and_kinds_are_sampled_from_either_format_with_a_given_base_and_encoder(
    sample: Sample, base_folder: Path, clip_name: str, tmp_path: Path, head: str, kind: str, extension: str
) -> None:
    tensors = to_published(tiny.shake(tiny.make_model(head=head, kind=kind)).trainable.state_dict())
    # the tiny encoder has fewer patches than the 257 of the published one
    metadata = with_metadata(tensors, {"kind": kind} | ({"num_tokens": "10"} if head == "full" else {}))
    save_adapter(tmp_path / f"a{extension}", tensors, metadata)
    sample(adapter=tmp_path / f"a{extension}", base=base_folder, encoder=clip_name, scale=[0, 0.5])
    with Image.open(tmp_path / "out.png") as grid:
        top, pitch = grid.height - tiny.IMAGE_PX, (grid.width + GAP_PX) // 2
        alone, prompted = (grid.crop((x, top, x + tiny.IMAGE_PX, grid.height)) for x in (0, pitch))

    assert pitch > tiny.IMAGE_PX and alone.tobytes() != prompted.tobytes()
    assert all(len(each.getcolors()) > 1 for each in (alone, prompted))


def test_a_file_without_metadata_needs_base_and_encoder(
    sample: Sample, refused: Sample, adapter: Path, base_folder: Path, clip_name: str, tmp_path: Path
) -> None:
    sample(out=tmp_path / "known.png")
    save_file(load_file(adapter), adapter)  # as others publish them
    assert "give base=… and encoder=…" in refused()

    sample(base=base_folder, encoder=clip_name, out=tmp_path / "given.png")
    assert pixels(tmp_path / "known.png") == pixels(tmp_path / "given.png")


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
        ({"num_steps": 1001}, ["num_steps=1001", "at most 1000"]),
        ({"width": 100_000}, ["width=100000", "at most 16384"]),
        ({"start_image": __file__, "strength": 0.1}, ["strength=0.1 num_steps=2"]),
        ({"references": "[{images: a.png]"}, ["is not YAML"]),
        ({"references": "[{images: a.png, 5: 1}]"}, ["5 is none of"]),
        ({"num_steps": 0}, ["num_steps=0", "at least 1"]),
        ({"guidance_rescale": 1.5}, ["guidance_rescale=1.5", "at most 1"]),
        ({"width": 25}, ["width=25", "multiples of 2 px"]),
        ({"seed": -1}, ["seed=-1", "at least 0"]),
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
def test_a_wrong_option_is_named_in_one_line(refused: Sample, changed: dict[str, object], expected: list[str]) -> None:
    message = refused(**changed)

    assert message.startswith("sample: ")
    for words in expected:
        assert words in message


def test_broken_adapters_are_refused(refused: Sample, adapter: Path, base_folder: Path, clip_name: str) -> None:
    tensors, named = load_file(adapter), {"base": str(base_folder), "encoder": clip_name}
    adapter.write_bytes(adapter.read_bytes()[:-100])
    message = refused()
    assert str(adapter) in message and "not a safetensors file" in message

    wide = tensors | {"image_proj.proj.weight": torch.zeros(4 * tiny.CONTEXT_WIDTH, 1024)}
    save_adapter(adapter, wide, named)
    message = refused()
    assert "(1024)" in message and f"width {tiny.POOLED_WIDTH}" in message

    save_adapter(adapter, {name: each for name, each in tensors.items() if "3.to_v_ip" not in name}, named)
    assert str(adapter) in refused()


def test_broken_images_are_refused(refused: Sample, image: Path) -> None:
    whole = image.read_bytes()
    for content in (b"", b"no image", whole[:60]):
        image.write_bytes(content)
        assert f"image={image}" in refused()


@pytest.mark.usefixtures("loaded_once")
def test_an_existing_image_stays_when_writing_fails(sample: Sample, tmp_path: Path) -> None:
    sample()
    before = (tmp_path / "out.png").read_bytes()
    (tmp_path / "file").touch()

    with pytest.raises(SystemExit, match="could not write"):
        sample(out=tmp_path / "file" / "out.png", seed=5)
    assert (tmp_path / "out.png").read_bytes() == before


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
