"""`python -m ipa.tools.app` without a browser: settings, uploads, the queue, who may use the page."""

import base64
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image, ImageChops
from tars import bomb, saved

from ipa.errors import UserError
from ipa.prompter import Prompter
from ipa.tools import sample as sample_tool
from ipa.tools.app.__main__ import Options, check_password, main
from ipa.tools.app.settings import as_command, as_python, read_page
from ipa.tools.app.uploads import Files, check_picture, check_pictures
from ipa.tools.options import read_options
from ipa.tools.sample import items_of, make, pipeline_of, settings_of

FIXED = {"adapter": ["a.safetensors", "b.safetensors"], "control_model": None, "base": None, "dtype": "float32"}
PAGE: dict[str, Any] = {
    **{"image": ["cat.png"], "text": "on a beach", "negative_text": "", "scale": 0.5, "scales": "", "blocks": []},
    **{"start": 0, "end": 1, "combine": "concat", "mask": None, "adapter": ["a.safetensors"], "seed": 3, "count": 1},
    **{"width": tiny.IMAGE_PX, "height": tiny.IMAGE_PX, "num_steps": 2, "guidance": 2.0, "guidance_rescale": 0},
    **{"keep_outside": False, "start_image": None, "strength": 0.5, "control": None, "control_weight": 1},
}


def read(**changed: Any) -> dict[str, Any]:
    return read_page(PAGE | changed, FIXED, tiny.IMAGE_PX)


# settings


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"text": 'it\'s [red, blue]: "x" # 100 % \\ {a: 1} null', "negative_text": "[]"},
        {"text": "null", "negative_text": "1e3"},
        {"text": "two\nlines\tand ${oc.env:HOME} 🙂 東京"},
        {"text": "a=b", "image": ["one.png", "two.jpg"], "combine": "norm average"},
        {"scales": "0, 0.5 1", "blocks": ["ease in", "linear"], "adapter": FIXED["adapter"], "count": 2},
        {"blocks": ["weak middle"], "start": 0.1, "end": 0.7, "mask": "mask.png", "width": 2 * tiny.IMAGE_PX},
        {"start_image": "photo.png", "strength": 0.25},
    ],
    ids=str,
)
def test_settings_are_those_of_the_copied_command(changed: dict[str, Any]) -> None:
    settings = read(**changed)
    shell = ["bash", "-c", f"printf '%s\\0' {as_command(settings)}"]
    *words, rest = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")
    arguments = words[3:]

    assert words[:3] == ["python", "-m", "ipa.tools.sample"] and rest == ""
    assert settings_of(read_options(arguments, sample_tool.Options)) == settings
    assert settings["text"] == [changed.get("text", PAGE["text"])]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image": []}, "give a picture"),
        ({"scale": float("nan")}, "scale=.*NaN"),
        ({"scale": -1}, "scale=-1"),
        ({"scales": "0, many"}, "0, many"),
        ({"count": 25}, "25 images"),
        ({"scales": "0 1 2", "count": 9}, "27 images"),
        ({"seed": None}, "give a seed"),
        ({"seed": -1}, "seed=-1"),
        ({"num_steps": 1000}, "steps: at most"),
        ({"width": 100 * tiny.IMAGE_PX}, "width and height: at most"),
        ({"text": "x" * 3000}, "letters"),
        ({"text": "${broken"}, "text="),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used_are_named(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(**changed)


def test_python_makes_the_images_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompter = Prompter([tiny.shake(tiny.make_model())], {"guidance": 2.0, "batch_size": 8})
    prompter.models[0].adapter.install()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Prompter, "load", lambda *_, **__: prompter)
    for name, colour in (("cat.png", "teal"), ("photo.png", "red")):
        Image.new("RGB", (30, 20), colour).save(name)
    ways: list[dict[str, Any]] = [
        {},
        {"scales": "0 0.5 1", "blocks": ["ease in", "linear"], "count": 2},
        {"start_image": "photo.png", "end": 0.6, "num_steps": 4},
    ]
    for way in ways:
        settings = read(**way)
        found: dict[str, Any] = {}
        exec(as_python(settings), found)
        made = prompter.generate(
            items_of(settings),
            num_steps=settings["num_steps"],
            guidance=2.0,
            guidance_rescale=0.0,
            **dict(zip(("pipeline", "arguments"), pipeline_of(prompter, settings), strict=True)),
        )
        assert len(found["images"]) == len(made) > 0
        for one, other in zip(found["images"], made, strict=True):
            assert one.width == tiny.IMAGE_PX and ImageChops.difference(one, other).getextrema() <= ((0, 1),) * 3


# uploads


GOOD = saved(Image.effect_noise((40, 30), 80), "PNG")
BAD = {
    "page.jpg": (b"<!doctype html><html>", "page.jpg cannot be read as a picture: it is a web page"),
    "bomb.png": (bomb(), "bomb.png has more than 50 million pixels"),
    "large.png": (bomb(8_000, 8_000), "large.png has more than 50 million pixels"),
    "half.png": (GOOD[: len(GOOD) // 2], "half.png is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_gets_one_clear_message(name: str, tmp_path: Path) -> None:
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.png").write_bytes(GOOD)
    with pytest.raises(UserError, match=f"^{words}"):
        check_picture(tmp_path / name)

    good, complaints = check_pictures([tmp_path / "good.png", tmp_path / name])
    assert good == [tmp_path / "good.png"] and len(complaints) == 1


def test_pictures_of_one_name_get_names_of_their_own(tmp_path: Path) -> None:
    for folder in ("one", "two", "job"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "im age.png").write_bytes(GOOD)
    files = Files(tmp_path / "job")
    names = [files.add(str(tmp_path / folder / "im age.png")) for folder in ("one", "two")]

    assert names == files.made == ["im_age.png", "im_age-2.png"]
    assert (tmp_path / "job" / "im_age-2.png").read_bytes() == GOOD


def test_a_painted_mask_is_white_where_it_is_painted(tmp_path: Path) -> None:
    canvas = Image.new("RGBA", (512, 256))
    empty = "data:image/png;base64," + base64.b64encode(saved(canvas, "PNG")).decode()
    canvas.paste("orange", (0, 0, 256, 256))
    half = "data:image/png;base64," + base64.b64encode(saved(canvas, "PNG")).decode()
    files = Files(tmp_path)

    assert files.add_mask(None, (64, 32)) is files.add_mask(empty, (64, 32)) is None
    assert files.add_mask(half, (64, 32)) == "mask.png"
    mask = Image.open(tmp_path / "mask.png")
    assert mask.size == (64, 32) and [mask.getpixel((x, 16)) for x in (0, 30, 33, 63)] == [255, 255, 0, 0]
    for broken in ("data:image/png;base64,AAAA", "nonsense", "data:image/png;base64,?"):
        with pytest.raises(UserError, match="the mask cannot be read"):
            files.add_mask(broken, (64, 32))


def test_presets_of_the_base_are_offered(tmp_path: Path) -> None:
    page = pytest.importorskip("ipa.tools.app.page")
    model = tiny.make_model()
    model.family.source = str(tmp_path)
    (tmp_path / "presets.yaml").write_text("mine: {mid_block: 1.0}")
    assert "mine" in page.Page(Prompter([model]), FIXED).offer().presets


def test_the_pages_default_of_rescaled_guidance_is_left_to_the_pipeline(tmp_path: Path) -> None:
    """A ControlNet's pipeline has none and would refuse it as an option."""
    page = pytest.importorskip("ipa.tools.app.page")
    own = page.Page(Prompter([tiny.make_model()], {"guidance_rescale": 0.7}), FIXED)
    own.inputs = list(PAGE)
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "cat.png")
    for given, left in ((0.7, None), (0.5, 0.5), (0, 0)):
        values = PAGE | {"image": [(str(tmp_path / "cat.png"), None)], "guidance_rescale": given}
        (folder := tmp_path / str(given)).mkdir()
        settings, _ = own.prepare(list(values.values()), folder)
        assert settings["guidance_rescale"] == left


# jobs


def test_a_cancelled_job_stops_between_two_steps(tmp_path: Path) -> None:
    page = pytest.importorskip("ipa.tools.app.page")
    prompter = Prompter([tiny.shake(tiny.make_model())], {"guidance": 2.0, "batch_size": 8})
    prompter.models[0].adapter.install()
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "cat.png")
    settings = read(image=[str(tmp_path / "cat.png")], num_steps=100)
    steps = []
    job = page.Job(lambda done, desc: (steps.append(done), job.stop.set() if done == (3, 100) else None))
    pipeline, arguments = pipeline_of(prompter, settings)
    pipeline.progress_bar = job.progress_bar
    with pytest.raises(page.Cancelled):
        make(prompter, settings, pipeline, arguments)
    assert steps == [(0, 100), (1, 100), (2, 100), (3, 100)]


# who may use the page


@pytest.mark.parametrize(
    ("host", "password", "words"),
    [
        ("0.0.0.0", None, r"host=0.0.0.0: others can reach this page, so give password="),
        ("::", "", "others can reach"),
        ("workstation", None, "others can reach"),
        ("127.0.0.1", "short", "password=…: give at least 8"),
    ],
)
def test_a_page_for_others_needs_a_password(host: str, password: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_password(host, password)
    assert "short" not in str(caught.value)
    for fine in ("127.0.0.1", "localhost", "::1"):
        check_password(fine, None)
    check_password("0.0.0.0", "long enough")


def test_a_password_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "from the environment")

    assert read_options(["adapter=a", "password=${oc.env:SOME_PASSWORD}"], Options).password == "from the environment"


def test_without_gradio_it_is_said_what_to_install(
    command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "ipa.tools.app.page", raising=False)
    with pytest.raises(SystemExit, match=r"pip install 'gradio>=6'"):
        command(main, adapter="a")
