"""From the string in a file's metadata to the encoder, and back to a name that people know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from ipa.encoders import open_encoder, public_name, read_widths
from ipa.encoders.clip_vision import ClipVisionEncoder
from ipa.encoders.image_encoder import ImageEncoder
from ipa.encoders.open_clip import OpenClipEncoder
from ipa.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def vision_folder(tmp_path: Path) -> Path:
    tiny.make_vision(tiny.make_encoder()).save_pretrained(tmp_path / "image_encoder")
    return tmp_path / "image_encoder"


def assert_found_again(encoder: ImageEncoder, kind: type[ImageEncoder], source: str) -> None:
    assert type(encoder) is kind
    assert (encoder.source, encoder.weights) == (source, None)
    assert read_widths(encoder.source, encoder.weights) == encoder.widths
    again = open_encoder(encoder.source, encoder.weights, dtype="bfloat16")
    assert type(again) is kind and again.blank(1).pooled_BE.dtype == torch.bfloat16


def test_an_open_clip_folder_is_opened(clip_name: str) -> None:
    assert_found_again(open_encoder(clip_name), OpenClipEncoder, clip_name)


def test_a_transformers_folder_is_opened(vision_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(vision_folder.parent)

    assert_found_again(open_encoder(str(vision_folder)), ClipVisionEncoder, str(vision_folder))
    assert_found_again(open_encoder("image_encoder"), ClipVisionEncoder, "image_encoder")
    apart = ClipVisionEncoder.from_pretrained(str(vision_folder.parent), subfolder="image_encoder")
    assert_found_again(apart, ClipVisionEncoder, str(vision_folder))


def test_a_built_in_name_is_open_clips(tmp_path: Path) -> None:
    assert read_widths("ViT-H-14", "laion2b_s32b_b79k") == (1024, 1280, 257, 224)
    for opened in (open_encoder, read_widths):
        with pytest.raises(ValueError, match=r"encoder\.name=ViT-H-14 .*laion2b_s32b_b79k"):
            opened("ViT-H-14", "wrong_tag")
        with pytest.raises(ValueError, match="open_clip has no such model"):
            opened("clip-of-mine")


@pytest.mark.parametrize("opened", [open_encoder, read_widths])
def test_paths_of_the_hub_go_to_the_library_that_their_form_names(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(UserError, match=r"encoder\.path=nobody/nothing/models: there is no such folder"):
        opened("nobody/nothing/models")
    with pytest.raises(UserError, match=r"encoder\.name=hf-hub:nobody/nothing: the hub gives no"):
        opened("hf-hub:nobody/nothing")


@pytest.mark.parametrize("opened", [open_encoder, read_widths])
def test_weights_apart_from_a_folder_that_has_its_own_are_refused(opened, vision_folder: Path, clip_name: str) -> None:
    with pytest.raises(ValueError, match="has its own weights: leave out openai"):
        opened(str(vision_folder), "openai")
    with pytest.raises(ValueError, match=r"give encoder\.pretrained=null"):
        opened(clip_name, "openai")


@pytest.mark.parametrize(
    ("name", "weights", "public"),
    [
        ("ViT-H-14", "laion2b_s32b_b79k", "OpenCLIP ViT-H/14 (laion2b_s32b_b79k)"),
        ("ViT-bigG-14", "laion2b_s39b_b160k", "OpenCLIP ViT-bigG/14 (laion2b_s39b_b160k)"),
        ("ViT-L-14-quickgelu", "openai", "CLIP ViT-L/14 (openai)"),
    ],
)
def test_public_names_are_those_of_the_models_with_these_widths(name: str, weights: str, public: str) -> None:
    widths = read_widths(name, weights)

    assert public_name("pooled", widths.pooled) == public_name("patches", widths.patch) == public
    assert weights in public


def test_a_width_of_no_public_encoder_has_no_name() -> None:
    assert public_name("pooled", 1664) is None
    assert public_name("patches", 768) is None


def test_importing_the_package_stays_light() -> None:
    code = "import sys, ipa.encoders; print(sorted({'torch', 'open_clip', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"
