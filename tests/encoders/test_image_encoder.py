"""What every image encoder promises, on one of each kind, and how a file's metadata finds it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from ipa.adapter.heads import FullHead, GlobalHead, ResamplerHead
from ipa.encoders import EXTRA, open_encoder, read_widths
from ipa.encoders.image_encoder import ImageEncoder
from ipa.encoders.open_clip import OpenClipEncoder
from ipa.encoders.vision_model import VisionModelEncoder
from ipa.errors import UserError
from ipa.types import EncoderWidths

E, F, PX = tiny.POOLED_WIDTH, tiny.PATCH_WIDTH, tiny.REFERENCE_PX
# E, F, P, and the image size: 9 patches of 8 px, with a class token, without, with registers, after a crop
WIDTHS = {
    "open_clip": (E, F, 10, PX),
    "clip": (E, F, 10, PX),
    "whole_clip": (E, F, 10, PX),
    "siglip": (F, F, 9, PX),
    "dinov2": (F, F, 5, 16),
    "registers": (F, F, 14, PX),
    "oblong_patches": (E, F, 7, PX),
    "with_tokens": (E, F, 10, PX),
    "timm": (E, 64, 5, 32),
    "timm_without_class_token": (E, 96, 100, 160),
    "resnet": (E, 0, 0, 64),
    "convnext": (E, 0, 0, 96),
}
SLOW = {"timm_without_class_token", "convnext"}
KINDS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in WIDTHS]
DIFFERENT = ["open_clip", "clip", "siglip", "dinov2"]


@pytest.mark.parametrize("name", KINDS)
def test_widths_are_those_of_the_features_and_the_source_finds_the_encoder_again(name: str, sources) -> None:
    encoder = open_encoder(sources[name])
    again = open_encoder(encoder.source, encoder.weights, "bfloat16", encoder.layer_name("patches"))
    image = torch.rand(2, 3, encoder.image_size_px, encoder.image_size_px) * 2 - 1
    pooled = encoder.encode(image).pooled_BE

    assert encoder.widths == again.widths == read_widths(sources[name]) == WIDTHS[name]
    assert (type(encoder), encoder.source, encoder.weights) == (type(again), sources[name], None)
    assert isinstance(encoder, OpenClipEncoder if sources[name].startswith("local-dir:") else VisionModelEncoder)
    torch.testing.assert_close(again.blank(1).pooled_BE.float(), encoder.blank(1).pooled_BE, rtol=0.1, atol=0.1)
    assert pooled.shape == encoder.blank(2).pooled_BE.shape == (2, encoder.width("pooled"))
    assert (pooled[0] - pooled[1]).abs().max() > 1e-6, "different images, different features"
    if encoder.widths.patch:
        patches = encoder.encode(image, "patches").patches_BPF
        assert patches.shape == encoder.blank(2, "patches").patches_BPF.shape == (2, *WIDTHS[name][2:0:-1])
        heads = [head.fitting(encoder.widths, 16) for head in (GlobalHead, ResamplerHead, FullHead)]
        assert all(head(encoder.blank(2, head.uses)).shape == (2, head.num_tokens, 16) for head in heads)
        assert heads[-1].num_tokens == encoder.widths.num_patches
        return
    for ask in (encoder.width, lambda uses: encoder.blank(1, uses)):
        with pytest.raises(UserError, match=rf"{name} has no patches features: use tokens=global"):
            ask("patches")


@pytest.mark.parametrize("name", ["open_clip", "timm", "clip", "siglip"])
def test_the_weights_are_not_needed_for_the_widths(name: str, sources: dict[str, str], tmp_path: Path) -> None:
    kind, _, folder = sources[name].rpartition(":")
    for file in Path(folder).glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())

    assert read_widths(f"{kind}:{tmp_path}" if kind else str(tmp_path)) == WIDTHS[name]
    with pytest.raises(UserError, match="weights cannot be loaded"):
        open_encoder(f"{kind}:{tmp_path}" if kind else str(tmp_path))


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_encoder_stays_frozen_and_its_blank_image_is_zero_after_normalisation(name: str, sources) -> None:
    encoder = open_encoder(sources[name]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    edge = encoder.image_size_px
    image = (2 * encoder.mean - 1).expand(1, 3, edge, edge).clone().requires_grad_()
    for uses in ("pooled", "patches"):
        expected, blank = encoder.encode(image, uses), encoder.blank(2, uses)
        assert not only(expected).requires_grad
        torch.testing.assert_close(only(blank), only(expected).expand_as(only(blank)), rtol=1e-5, atol=1e-5)


def only(features: Any) -> torch.Tensor:
    """The one tensor of features that is there."""
    (found,) = (tensor for tensor in vars(features).values() if tensor is not None)
    return found


@pytest.mark.parametrize("uses", ["pooled", "patches"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["open_clip", "clip"])
def test_features_do_not_depend_on_autocast_around_them(name, sources, image, uses: Any, dtype: str) -> None:
    encoder = open_encoder(sources[name], dtype=dtype)
    plain, blank = encoder.encode(image, uses), encoder.blank(1, uses)
    with torch.autocast("cpu", dtype=torch.float16 if dtype == "bfloat16" else torch.bfloat16):
        inside, blank_inside = encoder.encode(image, uses), encoder.blank(1, uses)

    for ours, theirs in ((inside, plain), (blank_inside, blank)):
        assert only(ours).dtype == getattr(torch, dtype)
        assert torch.equal(only(ours), only(theirs))


@pytest.mark.parametrize("name", ["open_clip", "timm", "siglip"])
def test_the_layer_of_the_patches_can_be_chosen(name: str, sources: dict[str, str]) -> None:
    penultimate, last = open_encoder(sources[name]), open_encoder(sources[name], layer="-1")
    seen: list[torch.Tensor] = []
    blocks = {
        "open_clip": lambda visual: visual.transformer.resblocks,
        "timm": lambda visual: visual.trunk.blocks,
        "siglip": lambda visual: visual.encoder.layers,
    }[name](last.visual)
    blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))

    assert torch.equal(last.blank(1, "patches").patches_BPF, seen[0][0] if isinstance(seen[0], tuple) else seen[0])
    assert not torch.equal(last.blank(1, "patches").patches_BPF, penultimate.blank(1, "patches").patches_BPF)
    assert (penultimate.layer_name("patches"), last.layer_name("patches")) == ("penultimate", "-1")
    assert penultimate.layer_name("pooled") == "projected"
    for layer, message in (("0", "negative"), ("-40", "encoder.layer=-40"), ("last", "layer=last")):
        with pytest.raises(UserError, match=message):
            read_widths(sources[name], layer=layer)


def test_a_source_goes_to_the_library_that_its_form_names(sources: dict[str, str]) -> None:
    for arguments, message in (
        (("nobody/nothing/models",), r"encoder\.path=nobody/nothing/models: .* no such folder"),
        (("hf-hub:nobody/nothing",), r"encoder\.name=hf-hub:nobody/nothing: open_clip_config\.json cannot"),
        (("clip-of-mine",), "open_clip has no such model"),
        ((sources["clip"], "openai"), "has its own weights: omit openai"),
    ):
        with pytest.raises(UserError, match=message):
            open_encoder(*arguments)


class MeanColour(ImageEncoder):
    """An encoder of its own: one class."""

    @classmethod
    def from_pretrained(cls, path: str, dtype: str = "float32", layer: int = -2) -> MeanColour:
        visual = torch.nn.Linear(3, 5).to(getattr(torch, dtype))
        return cls(visual, 16, mean=[0.5] * 3, std=[0.5] * 3, source=path, layer=layer)

    @classmethod
    def read_widths(cls, path: str, dtype: str = "float32", layer: int = -2) -> EncoderWidths:
        return cls.from_pretrained(path).widths

    def forward(self, normalized_B3HW: torch.Tensor, uses: Any) -> torch.Tensor | None:
        return self.visual(normalized_B3HW.mean((2, 3))) if uses == "pooled" else None


def test_a_further_encoder_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRA, "colour:", MeanColour)
    encoder = open_encoder("colour:mean", dtype="bfloat16")

    assert type(encoder) is MeanColour
    assert encoder.widths == read_widths(encoder.source) == (5, 0, 0, 16)
    assert encoder.encode(torch.zeros(2, 3, 16, 16)).pooled_BE.shape == (2, 5)
