"""Encoders in transformers' layout: the features of open_clip with the same weights, and how they are loaded."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from ipa.data.images.transforms import Opened, fit_reference
from ipa.encoders.clip_vision import ClipVisionEncoder, locate
from ipa.encoders.open_clip import OpenClipEncoder
from ipa.errors import UserError
from ipa.types import EncoderWidths, Features, to_unit_range

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = EncoderWidths(tiny.POOLED_WIDTH, tiny.PATCH_WIDTH, 10, tiny.REFERENCE_PX)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CLIPVisionModelWithProjection folder with the weights of `tiny.make_encoder`, without a preprocessor."""
    tiny.make_vision(tiny.make_encoder()).save_pretrained(tmp_path / "image_encoder")
    return tmp_path / "image_encoder"


@pytest.fixture
def image() -> torch.Tensor:
    return to_unit_range(tiny.make_pictures(3, tiny.REFERENCE_PX))


def assert_same(ours: Features, theirs: Features, atol: float) -> None:
    for name, tensor in vars(ours).items():
        other = getattr(theirs, name)
        assert (tensor is None) is (other is None)
        if tensor is not None:
            torch.testing.assert_close(tensor, other, rtol=0, atol=atol)


@pytest.mark.parametrize("uses", ["pooled", "patches"])
def test_features_are_those_of_open_clip_with_the_same_weights(folder: Path, image: torch.Tensor, uses: Any) -> None:
    ours, theirs = ClipVisionEncoder.from_pretrained(str(folder)), tiny.make_encoder()

    assert_same(ours.encode(image, uses), theirs.encode(image, uses), atol=1e-4)
    assert_same(ours.blank(2, uses), theirs.blank(2, uses), atol=1e-4)
    assert ours.widths == theirs.widths == WIDTHS
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(module.training for module in ours.train().modules())


def demo_pictures(count: int, size_px: int) -> torch.Tensor:
    """The first pictures of the demo world's held-out shard, in [-1, 1]."""
    with tarfile.open(ROOT / "demo/data/heldout/00000.tar") as shard:
        members = [member for member in shard if member.name.endswith(".webp")][:count]
        files = [shard.extractfile(member).read() for member in members]
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    return to_unit_range(torch.stack([fit_reference(Opened.of(picture), size_px) for picture in pictures]))


@pytest.mark.parametrize("uses", ["pooled", "patches"])
def test_the_demo_encoder_sees_the_same_in_both_layouts(uses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    theirs, ours = (instantiate(OmegaConf.load(f"conf/encoder/{name}.yaml")) for name in ("demo", "demo_clip_vision"))
    pictures = demo_pictures(4, ours.image_size_px)

    assert isinstance(theirs, OpenClipEncoder) and isinstance(ours, ClipVisionEncoder)
    assert ours.widths == theirs.widths == (192, 128, 65, 64)
    assert ours.widths == ClipVisionEncoder.read_widths("demo/image_encoder")
    assert theirs.widths == OpenClipEncoder.read_widths("local-dir:demo/encoder")
    assert_same(ours.encode(pictures, uses), theirs.encode(pictures, uses), atol=1e-4)
    assert_same(ours.blank(1, uses), theirs.blank(1, uses), atol=1e-4)
    pooled = ours.encode(pictures).pooled_BE
    assert (pooled[0] - pooled[1]).abs().max() > 0.01, "different pictures, different features"


def test_widths_are_read_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    assert ClipVisionEncoder.read_widths(str(folder)) == WIDTHS


def test_mean_and_deviation_come_from_the_preprocessor_else_from_clip(folder: Path) -> None:
    plain = ClipVisionEncoder.from_pretrained(str(folder))
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    other = ClipVisionEncoder.from_pretrained(str(folder))

    assert torch.equal(plain.mean, tiny.make_encoder().mean) and torch.equal(plain.std, tiny.make_encoder().std)
    assert other.mean.flatten().tolist() == pytest.approx(mean) and other.std.flatten().tolist() == pytest.approx(std)


@pytest.mark.parametrize("uses", ["pooled", "patches"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_do_not_depend_on_autocast_around_them(folder: Path, image, uses: Any, dtype: str) -> None:
    encoder = ClipVisionEncoder.from_pretrained(str(folder), dtype=dtype)
    plain = encoder.encode(image, uses)
    with torch.autocast("cpu", dtype=torch.float16 if dtype == "bfloat16" else torch.bfloat16):
        inside = encoder.encode(image, uses)

    assert_same(inside, plain, atol=0)
    assert (inside.pooled_BE if uses == "pooled" else inside.patches_BPF).dtype == getattr(torch, dtype)


def test_the_image_tower_of_a_whole_clip_is_read(folder: Path, image: torch.Tensor, tmp_path: Path) -> None:
    vision = ClipVisionEncoder.from_pretrained(str(folder))
    text = CLIPTextConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.visual.config.to_dict(), projection_dim=tiny.POOLED_WIDTH
    )
    clip = CLIPModel(config)
    clip.load_state_dict(vision.visual.state_dict(), strict=False)
    clip.save_pretrained(tmp_path / "clip")
    loaded = ClipVisionEncoder.from_pretrained(str(tmp_path / "clip"))

    assert loaded.widths == ClipVisionEncoder.read_widths(str(tmp_path / "clip")) == WIDTHS
    assert torch.equal(loaded.encode(image).pooled_BE, vision.encode(image).pooled_BE)


@pytest.mark.parametrize(
    ("path", "subfolder"), [("", "image_encoder"), ("image_encoder", None), ("image_encoder/", "")]
)
def test_a_subfolder_may_stand_apart_or_behind(folder: Path, path: str, subfolder: str | None, monkeypatch) -> None:
    monkeypatch.chdir(folder.parent)
    encoder = ClipVisionEncoder.from_pretrained(path or str(folder.parent), subfolder)

    assert encoder.source == (f"{folder.parent}/image_encoder" if not path else "image_encoder")
    assert ClipVisionEncoder.read_widths(encoder.source) == encoder.widths, "a string alone finds it again"


@pytest.mark.parametrize(
    ("given", "root", "folder"),
    [
        (("h94/IP-Adapter/models/image_encoder",), "h94/IP-Adapter", "models/image_encoder"),
        (("h94/IP-Adapter", "sdxl_models/image_encoder"), "h94/IP-Adapter", "sdxl_models/image_encoder"),
        (("openai/clip-vit-large-patch14",), "openai/clip-vit-large-patch14", ""),
    ],
)
def test_of_a_hub_path_two_names_are_the_id_and_the_rest_the_subfolder(given, root: str, folder: str) -> None:
    assert locate(*given) == ("/".join(given), root, folder)


@pytest.fixture
def hub_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The encoder in a hub cache, where a download would have put it, with the hub out of reach."""
    repository = tmp_path / "hub" / "models--someone--adapters"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40) / "models").mkdir(parents=True)
    folder.rename(repository / "snapshots" / ("0" * 40) / "models" / "image_encoder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "someone/adapters/models/image_encoder"


def test_a_hub_path_is_loaded_from_its_repository(hub_path: str, image: torch.Tensor) -> None:
    encoder = ClipVisionEncoder.from_pretrained(hub_path)

    assert encoder.source == hub_path
    assert ClipVisionEncoder.read_widths(hub_path) == encoder.widths == WIDTHS
    assert_same(encoder.encode(image), tiny.make_encoder().encode(image), atol=1e-4)
    with pytest.raises(
        FileNotFoundError, match=r"encoder\.path=someone/adapters/models: there is no such folder, and the"
    ):
        ClipVisionEncoder.from_pretrained("someone/adapters", "models")


def test_weights_that_are_missing_do_not_start_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(ValueError, match=r"1 weights are missing, visual_projection\.weight"):
        ClipVisionEncoder.from_pretrained(str(folder))


def test_broken_weights_are_one_message(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing")

    with pytest.raises(ValueError, match=rf"encoder\.path={folder}: the weights cannot be loaded"):
        ClipVisionEncoder.from_pretrained(str(folder))


@pytest.mark.parametrize("read", [ClipVisionEncoder.from_pretrained, ClipVisionEncoder.read_widths])
def test_what_is_no_clip_image_encoder_is_named(read, folder: Path, clip_name: str, tmp_path: Path) -> None:
    open_clip_folder = clip_name.removeprefix("local-dir:")
    with pytest.raises(UserError, match=rf"encoder=demo encoder\.name={clip_name}"):
        read(open_clip_folder)
    with pytest.raises(UserError, match=rf"encoder\.path={tmp_path}: there is no config\.json in it\. Give"):
        read(str(tmp_path))
    for nowhere in (f"{tmp_path}/nowhere", "nowhere", "./no/where"):
        with pytest.raises(UserError, match=rf"encoder\.path={nowhere}: no such folder\. .*owner/name"):
            read(nowhere)
    with pytest.raises(ValueError, match=r"encoder\.path=no body/nothing: config\.json cannot be read"):
        read("no body/nothing")
    with pytest.raises(ValueError, match=r"encoder\.dtype=half: one of float32"):
        read(str(folder), dtype="half")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "siglip_vision_model"}))
    with pytest.raises(ValueError, match=r"of type siglip_vision_model; one of clip_vision_model, clip is needed"):
        read(str(folder))
