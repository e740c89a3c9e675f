"""`python -m ipa.tools.sample`: a picture from an adapter file, or one line that says what is wrong."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ipa.data.images.transforms import FITS
from ipa.export.published import to_published, with_metadata
from ipa.export.storage import save_adapter
from ipa.model import IPAdapterModel
from ipa.tools.sample import main

ROOT = Path(__file__).resolve().parents[2]

Sample = Callable[..., str]


@pytest.fixture
def adapter(tmp_path: Path, model: IPAdapterModel, base_folder: Path, clip_name: str) -> Path:
    """An adapter file whose metadata names its base and encoder."""
    metadata = {"format": "ip-adapter", "base": str(base_folder), "encoder": clip_name}
    save_adapter(tmp_path / "adapter.safetensors", to_published(model.trainable.state_dict()), metadata)
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def sample(adapter: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sample:
    """Run the command in this process with a working line of options, some replaced; returns what it says.

    A failure is what ends the process with a message, which Python prints with exit code 1.
    """

    def run(**changed: object) -> str:
        out = image.with_name("out.png")
        options = {"adapter": adapter, "image": image, "out": out, "steps": 2, "scale": 0.5} | changed
        words = [f"{name}={value}" for name, value in options.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["sample", *words])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


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


def test_picture_is_written(sample: Sample, tmp_path: Path) -> None:
    assert sample(text="red: {heart}") == f"wrote {tmp_path}/out.png\n"

    with Image.open(tmp_path / "out.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (tiny.IMAGE_PX, tiny.IMAGE_PX))


def test_options_reach_the_picture(sample: Sample, tmp_path: Path) -> None:
    options = [{}, {"seed": 1}, {"text": "abc"}, {"scale": 1}, {"scale": 0}, {"guidance": 1}, {"steps": 3}]
    for number, changed in enumerate(options):
        sample(out=tmp_path / f"{number}.png", **changed)
    sample(out=tmp_path / "again.png")

    made = [pixels(tmp_path / f"{number}.png") for number in range(len(options))]
    assert len(set(made)) == len(options)
    assert pixels(tmp_path / "again.png") == made[0]


def test_several_pictures_become_a_row_and_the_ending_says_the_format(sample: Sample, tmp_path: Path) -> None:
    sample(num_images=3, out=tmp_path / "row.JPG")

    with Image.open(tmp_path / "row.JPG") as picture:
        assert (picture.format, picture.size) == ("JPEG", (3 * tiny.IMAGE_PX, tiny.IMAGE_PX))


def test_several_image_prompts_reach_one_picture(sample: Sample, image: Path, tmp_path: Path) -> None:
    other = image.with_name("other.png")
    Image.effect_noise((30, 20), 80).convert("RGB").save(other)
    prompts = {"one": image, "list": f"[{image}]", "two": f"[{image}, {other}]", "other": other}
    for name, prompt in prompts.items():
        sample(image=prompt, out=tmp_path / f"made_{name}.png")
    made = {name: pixels(tmp_path / f"made_{name}.png") for name in prompts}

    assert made["one"] == made["list"]
    assert len(set(made.values())) == 3


def test_the_image_prompt_is_cut_as_the_metadata_say(sample: Sample, adapter: Path, tmp_path: Path) -> None:
    Image.effect_noise((60, 20), 80).convert("RGB").save(tmp_path / "wide.png")
    made = {}
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata()
    for fit, way in FITS.items():
        save_file(load_file(adapter), adapter, metadata | {"preprocessing": way.words})
        sample(image=tmp_path / "wide.png", out=tmp_path / f"{fit}.png", scale=1)
        made[fit] = pixels(tmp_path / f"{fit}.png")
    save_file(load_file(adapter), adapter, metadata)
    sample(image=tmp_path / "wide.png", out=tmp_path / "plain.png", scale=1)

    assert len(set(made.values())) == 3
    assert pixels(tmp_path / "plain.png") == made["crop"]


@pytest.mark.parametrize("kind", ["decoupled", "simple"])
@pytest.mark.parametrize("head", ["global", "fine_grained", "full"])
def test_every_head_and_kind_is_sampled_from_either_format(
    sample: Sample, base_folder: Path, clip_name: str, tmp_path: Path, head: str, kind: str
) -> None:
    tensors = to_published(tiny.shake(tiny.make_model(head=head, kind=kind)).trainable.state_dict())
    # the tiny encoder's patches are fewer than the published one's 257
    metadata = with_metadata(tensors, {"num_tokens": "10"} if head == "full" else {})
    made = []
    for ending in [".safetensors"] if head == "full" else [".safetensors", ".bin"]:
        save_adapter(tmp_path / f"a{ending}", tensors, metadata)
        out = tmp_path / f"made{ending}.png"
        sample(adapter=tmp_path / f"a{ending}", base=base_folder, encoder=clip_name, out=out)
        made.append(pixels(out))
    sample(scale=0, base=base_folder, out=tmp_path / "alone.png")

    assert len(set(made)) == 1
    assert made[0] != pixels(tmp_path / "alone.png")


def test_base_and_encoder_may_be_given(
    sample: Sample, adapter: Path, base_folder: Path, clip_name: str, tmp_path: Path
) -> None:
    sample(out=tmp_path / "known.png")
    save_file(load_file(adapter), adapter)  # without metadata, as others publish them

    sample(base=base_folder, encoder=clip_name, out=tmp_path / "given.png")

    assert pixels(tmp_path / "known.png") == pixels(tmp_path / "given.png")


def test_file_without_metadata_asks_for_base_and_encoder(refused: Sample, adapter: Path) -> None:
    save_file(load_file(adapter), adapter)

    assert "does not say which base and encoder it was trained with: give base=… and encoder=…" in refused()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"imgae": "x.png"}, ["'imgae=x.png' is not one of the options", "Did you mean image=…?"]),
        ({"adapter": None, "image": None}, ["please give adapter=… and image=…"]),
        ({"scale": "much"}, ["scale=much", "'much'"]),
        ({"seed": "1.5"}, ["seed=1.5"]),
        ({"num_images": 0}, ["num_images=0", "at least 1"]),
        ({"steps": 0}, ["steps=0", "at least 1"]),
        ({"guidance_rescale": 1.5}, ["guidance_rescale=1.5", "from 0", "0.7"]),
        ({"device": "abacus"}, ["device=abacus"]),
        ({"adapter": "nowhere.safetensors"}, ["adapter=nowhere.safetensors: no such file"]),
        ({"image": "[]"}, ["image=[]", "at least one image prompt"]),
        ({"encoder_weights": "x"}, ["encoder.pretrained=x", "has its own weights"]),
        ({"dtype": "int7"}, ["base.dtype=int7"]),
        ({"image": "nowhere.png"}, ["image=nowhere.png: no such file"]),
        ({"base": "./nowhere"}, ["base.path=./nowhere", "no such folder"]),
        ({"encoder": "local-dir:nowhere"}, ["encoder.name=local-dir:nowhere", "open_clip_config.json"]),
        ({"out": "picture.foo"}, ["out=picture.foo", ".png"]),
        ({"out": "picture"}, ["out=picture", ".png"]),
    ],
    ids=str,
)
def test_wrong_option_is_told_in_one_line(refused: Sample, changed: dict[str, object], expected: list[str]) -> None:
    message = refused(**changed)

    assert message.startswith("sample: ")
    for words in expected:
        assert words in message


def test_word_that_is_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", "photo.png"])

    with pytest.raises(SystemExit, match=r"'photo\.png' is not one of the options"):
        main()


def test_truncated_adapter(refused: Sample, adapter: Path) -> None:
    adapter.write_bytes(adapter.read_bytes()[:-100])

    message = refused()

    assert str(adapter) in message
    assert "cut short" in message


def test_adapter_of_another_encoder_width(
    refused: Sample, adapter: Path, model: IPAdapterModel, base_folder: Path, clip_name: str
) -> None:
    tensors = to_published(model.trainable.state_dict())
    tensors["image_proj.proj.weight"] = torch.zeros(4 * tiny.CONTEXT_WIDTH, 1024)
    save_adapter(adapter, tensors, {"base": str(base_folder), "encoder": clip_name})

    message = refused()

    assert "which reads the pooled embedding of OpenCLIP ViT-H/14 (laion2b_s32b_b79k) (1024)" in message
    assert f"{clip_name} gives pooled embedding of width {tiny.POOLED_WIDTH}" in message


def test_adapter_that_lacks_a_tensor(
    refused: Sample, adapter: Path, model: IPAdapterModel, base_folder: Path, clip_name: str
) -> None:
    tensors = to_published(model.trainable.state_dict())
    del tensors["ip_adapter.3.to_v_ip.weight"]
    save_adapter(adapter, tensors, {"base": str(base_folder), "encoder": clip_name})

    assert str(adapter) in refused()


@pytest.mark.parametrize("content", [b"", b"no picture", "half"], ids=["empty", "text", "half"])
def test_broken_image(refused: Sample, image: Path, content: bytes | str) -> None:
    image.write_bytes(image.read_bytes()[:60] if content == "half" else content)

    message = refused()

    assert f"image={image} cannot be read as a picture" in message


def test_picture_that_was_there_stays_when_writing_fails(sample: Sample, tmp_path: Path) -> None:
    sample()
    before = (tmp_path / "out.png").read_bytes()
    (tmp_path / "file").touch()

    with pytest.raises(SystemExit, match="could not write"):
        sample(out=tmp_path / "file" / "out.png", seed=5)

    assert (tmp_path / "out.png").read_bytes() == before


@pytest.mark.slow
def test_command_in_a_process_of_its_own(adapter: Path, image: Path, tmp_path: Path) -> None:
    """Exit codes, and a console without the libraries' bars and warnings."""
    command = [sys.executable, "-m", "ipa.tools.sample", f"adapter={adapter}", f"image={image}", "steps=2", "out=a.png"]

    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout == "wrote a.png\n"
    assert result.stderr == ""


def test_help_and_misuse_answer_without_loading_anything_heavy(tmp_path: Path) -> None:
    for words, code in ((["--help"], 0), (["imgae=x"], 1)):
        command = [sys.executable, "-X", "importtime", "-m", "ipa.tools.sample", *words]
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
        imported = {
            line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")
        }

        assert result.returncode == code
        assert "omegaconf" in imported
        assert not imported & {"torch", "diffusers", "transformers", "open_clip", "lightning"}
