"""Encoders in transformers' layout: the features of open_clip with the same weights, and how they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from ipa.encoders.open_clip import OpenClipEncoder
from ipa.encoders.vision_model import VisionModelEncoder, locate
from ipa.errors import UserError
from ipa.types import EncoderWidths, Features, to_unit_range

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = EncoderWidths(tiny.POOLED_WIDTH, tiny.PATCH_WIDTH, 10, tiny.REFERENCE_PX)


@pytest.fixture
def folder(sources: dict[str, str], tmp_path: Path) -> Path:
    """A CLIPVisionModelWithProjection folder with the weights of `tiny.make_encoder`, without a preprocessor."""
    return Path(shutil.copytree(sources["clip"], tmp_path / "image_encoder"))


def assert_same(ours: Features, theirs: Features) -> None:
    for name, tensor in vars(ours).items():
        other = getattr(theirs, name)
        assert (tensor is None) is (other is None)
        if tensor is not None:
            torch.testing.assert_close(tensor, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("uses", ["pooled", "patches"])
def test_clip_gives_the_features_of_open_clip_with_the_same_weights(sources, image: torch.Tensor, uses: Any) -> None:
    ours, theirs = VisionModelEncoder.from_pretrained(sources["clip"]), tiny.make_encoder()
    whole = VisionModelEncoder.from_pretrained(sources["whole_clip"])

    assert_same(ours.encode(image, uses), theirs.encode(image, uses))
    assert_same(ours.blank(2, uses), theirs.blank(2, uses))
    assert_same(whole.encode(image, uses), ours.encode(image, uses))


def test_a_whole_clip_embeds_texts_with_its_own_tower(sources: dict[str, str], tmp_path: Path) -> None:
    whole = Path(shutil.copytree(sources["whole_clip"], tmp_path / "whole"))
    tiny.make_tokenizer().save_pretrained(whole)
    clip, tokens = CLIPModel.from_pretrained(whole), tiny.make_tokenizer()(["a cat"], return_tensors="pt")
    with torch.no_grad():
        states = clip.text_model(**tokens).pooler_output
        expected = clip.text_projection(states)

    torch.testing.assert_close(VisionModelEncoder.from_pretrained(str(whole)).embed_text("a cat"), expected)
    with pytest.raises(UserError, match="has no text tower"):
        VisionModelEncoder.from_pretrained(sources["dinov2"]).embed_text("a cat")


@pytest.mark.parametrize("name", ["siglip", "dinov2", "registers"])
def test_other_models_give_their_pooler_output_and_penultimate_states(name: str, sources: dict[str, str]) -> None:
    encoder = VisionModelEncoder.from_pretrained(sources[name])
    edge = encoder.image_size_px
    image = to_unit_range(tiny.make_pictures(2, edge))
    preprocessing = json.loads(Path(sources[name], "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(preprocessing[f"image_{what}"])[:, None, None] for what in ("mean", "std"))
    with torch.no_grad():
        theirs = encoder.visual(((image + 1) / 2 - mean) / std, output_hidden_states=True)

    assert_same(encoder.encode(image), Features(pooled_BE=theirs.pooler_output))
    assert_same(encoder.encode(image, "patches"), Features(patches_BPF=theirs.hidden_states[-2]))


def test_the_demo_encoder_sees_the_same_in_both_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    theirs, ours = (instantiate(OmegaConf.load(f"conf/encoder/{name}.yaml")) for name in ("demo", "demo_clip_vision"))
    images = to_unit_range(tiny.make_pictures(4, ours.image_size_px))

    assert isinstance(theirs, OpenClipEncoder) and isinstance(ours, VisionModelEncoder)
    assert ours.widths == theirs.widths == (192, 128, 65, 64)
    for uses in ("pooled", "patches"):
        assert_same(ours.encode(images, uses), theirs.encode(images, uses))
        assert_same(ours.blank(1, uses), theirs.blank(1, uses))


def test_mean_and_deviation_come_from_the_preprocessor_else_from_clip(folder: Path) -> None:
    plain, clip = VisionModelEncoder.from_pretrained(str(folder)), tiny.make_encoder()
    assert torch.equal(plain.mean, clip.mean) and torch.equal(plain.std, clip.std)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    other = VisionModelEncoder.from_pretrained(str(folder))
    assert (other.mean.flatten().tolist(), other.std.flatten().tolist()) == (pytest.approx(mean), pytest.approx(std))


def test_a_subfolder_may_be_given_apart_or_in_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for given, source in (
        ((str(folder.parent), "image_encoder"), f"{folder.parent}/image_encoder"),
        (("image_encoder", None), "image_encoder"),
        (("image_encoder/", ""), "image_encoder"),
    ):
        encoder = VisionModelEncoder.from_pretrained(*given)
        assert encoder.source == source
        assert VisionModelEncoder.read_widths(encoder.source) == encoder.widths, "a string alone finds it again"


def test_a_hub_path_is_loaded_from_its_repository(
    folder: Path, image: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache, where a download would have put it, with the hub out of reach.

    Two names of a path are the repository, and the rest is the subfolder.
    """
    for given, root, rest in (
        (("h94/IP-Adapter/models/image_encoder",), "h94/IP-Adapter", "models/image_encoder"),
        (("h94/IP-Adapter", "sdxl_models/image_encoder"), "h94/IP-Adapter", "sdxl_models/image_encoder"),
        (("openai/clip-vit-large-patch14",), "openai/clip-vit-large-patch14", ""),
    ):
        assert locate(*given)[:3] == ("/".join(given), root, rest)
    repository = tmp_path / "hub" / "models--someone--adapters"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40) / "models").mkdir(parents=True)
    folder.rename(repository / "snapshots" / ("0" * 40) / "models" / "image_encoder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    encoder = VisionModelEncoder.from_pretrained(hub_path := "someone/adapters/models/image_encoder")

    assert encoder.source == hub_path
    assert VisionModelEncoder.read_widths(hub_path) == encoder.widths == WIDTHS
    assert_same(encoder.encode(image), tiny.make_encoder().encode(image))
    with pytest.raises(UserError, match=r"encoder\.path=someone/adapters/models: .*no such folder"):
        VisionModelEncoder.from_pretrained("someone/adapters", "models")


def test_incomplete_and_broken_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["visual_projection.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, visual_projection\.weight"):
        VisionModelEncoder.from_pretrained(str(folder))
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"encoder\.path={folder}: the weights cannot be loaded"):
        VisionModelEncoder.from_pretrained(str(folder))


def test_what_is_not_a_vision_model_is_named(folder: Path, clip_name: str, tmp_path: Path) -> None:
    for path, message in (
        (clip_name.removeprefix("local-dir:"), rf"encoder=demo encoder\.name={clip_name}"),
        (str(tmp_path), rf"encoder\.path={tmp_path}: there is no config\.json in this folder"),
        (f"{tmp_path}/nowhere", rf"encoder\.path={tmp_path}/nowhere: no such folder\. .*owner/name"),
        *((path, rf"encoder\.path={path}: no such folder") for path in ("nowhere", "./no/where", "no body/nothing")),
        ("tests/nothing", r"encoder\.path=tests/nothing: no such folder"),  # there is a folder tests here
    ):
        for read in (VisionModelEncoder.from_pretrained, VisionModelEncoder.read_widths):
            with pytest.raises(UserError, match=message):
                read(path)
            with pytest.raises(UserError, match=r"encoder\.dtype=half: give float32"):
                read(str(folder), dtype="half")


def test_a_configuration_that_cannot_be_used_is_named(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    for config, message in (
        ({"model_type": "nonsense"}, "model of type nonsense, which is not a vision model"),
        ({"model_type": "dinov2"}, "no preprocessor_config.json with image_mean"),
        ({"model_type": "siglip2_vision_model"}, "no preprocessor_config"),
        ({"image_size": [24, 32]}, "reads images of 24 × 32"),
    ):
        (folder / "config.json").write_text(json.dumps(content | config))
        with pytest.raises(UserError, match=message):
            VisionModelEncoder.read_widths(str(folder))
