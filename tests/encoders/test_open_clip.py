"""The image encoder against transformers with the same weights, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import CLIPVisionModelWithProjection

from ipa.encoders.open_clip import OpenClipEncoder, read_pooled_width, resolve_name
from ipa.types import to_unit_range


@pytest.fixture
def encoder() -> OpenClipEncoder:
    return tiny.make_encoder()


@pytest.fixture
def image() -> torch.Tensor:
    return to_unit_range(tiny.make_pictures(3, tiny.REFERENCE_PX))


@pytest.fixture
def vision(encoder: OpenClipEncoder) -> CLIPVisionModelWithProjection:
    """transformers' model with the encoder's weights."""
    return tiny.make_vision(encoder)


def normalized(encoder: OpenClipEncoder, image: torch.Tensor) -> torch.Tensor:
    return ((image + 1) / 2 - encoder.mean) / encoder.std


def test_pooled_features_are_those_of_transformers(encoder, vision, image) -> None:
    with torch.no_grad():
        theirs = vision(normalized(encoder, image)).image_embeds
    pooled = encoder.encode(image).pooled_BE

    assert pooled.shape == (3, encoder.pooled_width) == (3, tiny.POOLED_WIDTH)
    torch.testing.assert_close(pooled, theirs, rtol=0, atol=1e-4)
    assert (pooled.norm(dim=-1) - 1).abs().min() > 0.1, "they are not to be normalised"


def test_patch_features_are_the_penultimate_hidden_states(encoder, vision, image) -> None:
    with torch.no_grad():
        theirs = vision(normalized(encoder, image), output_hidden_states=True).hidden_states[-2]
    features = encoder.encode(image, uses="patches")

    assert features.pooled_BE is None
    assert features.patches_BPF.shape == (3, 1 + 9, encoder.patch_width) == (3, 10, tiny.PATCH_WIDTH)
    torch.testing.assert_close(features.patches_BPF, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("uses", ["pooled", "patches"])
def test_the_blank_picture_is_zero_after_normalisation(encoder: OpenClipEncoder, uses: Any) -> None:
    mean_colour = (2 * encoder.mean - 1).expand(1, 3, tiny.REFERENCE_PX, tiny.REFERENCE_PX)
    expected, blank = encoder.encode(mean_colour, uses), encoder.blank(2, uses)

    for ours, theirs in ((blank.pooled_BE, expected.pooled_BE), (blank.patches_BPF, expected.patches_BPF)):
        assert (ours is None) is (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=1e-5, atol=1e-5)
            assert len(ours) == 2


def test_widths_are_what_features_have(encoder: OpenClipEncoder) -> None:
    assert encoder.image_size_px == tiny.REFERENCE_PX
    assert (encoder.width("pooled"), encoder.width("patches")) == (tiny.POOLED_WIDTH, tiny.PATCH_WIDTH)


def test_the_encoder_stays_frozen_and_in_eval_mode_whatever_the_trainer_asks(encoder, image) -> None:
    encoder.train()

    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.encode(image.requires_grad_()).pooled_BE.requires_grad


def test_a_folder_is_loaded_with_the_same_weights(clip_name: str, encoder, image) -> None:
    loaded = OpenClipEncoder.from_pretrained(clip_name)

    assert loaded.source == clip_name
    assert torch.equal(loaded.encode(image).pooled_BE, encoder.encode(image).pooled_BE)


def test_a_relative_folder_becomes_absolute(clip_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(clip_name.removeprefix("local-dir:"))
    monkeypatch.chdir(folder.parent)

    assert resolve_name("local-dir:clip") == clip_name
    assert OpenClipEncoder.from_pretrained("local-dir:clip").source == "local-dir:clip"  # as given: it goes into files


def test_weights_in_half_precision_take_and_give_the_same_features(clip_name: str, encoder, image) -> None:
    half = OpenClipEncoder.from_pretrained(clip_name, dtype="bfloat16")
    pooled = half.encode(image).pooled_BE

    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.float(), encoder.encode(image).pooled_BE, rtol=0.1, atol=0.1)


def test_the_width_is_read_without_weights(clip_name: str, tmp_path: Path) -> None:
    config = Path(clip_name.removeprefix("local-dir:")) / "open_clip_config.json"
    (tmp_path / config.name).write_bytes(config.read_bytes())

    assert read_pooled_width(f"local-dir:{tmp_path}") == tiny.POOLED_WIDTH
    assert read_pooled_width("ViT-H-14") == 1024
    assert read_pooled_width("ViT-bigG-14") == 1280


@pytest.mark.parametrize("read", [OpenClipEncoder.from_pretrained, read_pooled_width])
def test_what_is_not_there_is_named(read, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"encoder\.name=local-dir:{tmp_path}: there is no open_clip_config\.json"
    ):
        read(f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match=r"encoder\.name=ViT-Z-99: open_clip has no such model; `local-dir:FOLDER`"):
        read("ViT-Z-99")
