"""Which programs can read an adapter: what they assume, and what to do."""

from typing import Any

import pytest
import torch

from ipa.adapter.heads import FullHead, GlobalHead, Head, ResamplerHead
from ipa.errors import UserError
from ipa.export.layouts import LAYOUTS, check_layout, other_no_image
from ipa.types import EncoderWidths

VIT_H = EncoderWidths(1024, 1280, 257, 224)
SDXL_SIZES = {"width": 1280, "heads": 20}


def make(head: type[Head], context_width: int = 768, **options: Any) -> Head:
    with torch.device("meta"):
        return head.fitting(VIT_H, context_width, **options)  # type: ignore[attr-defined]


# head, context width, options, who cannot read it, and which sizes are named with what is expected
CASES: list[tuple[type[Head], int, dict[str, Any], list[str], list[str]]] = [
    (GlobalHead, 768, {"num_tokens": 7}, ["diffusers", "comfyui"], ["tokens.num_tokens=4, it is 7"]),
    (FullHead, 768, {}, [], []),
    (ResamplerHead, 768, {}, [], []),
    (ResamplerHead, 1024, {}, [], []),
    (ResamplerHead, 2048, SDXL_SIZES, [], []),
    (ResamplerHead, 2048, {}, ["comfyui"], ["resampler.heads=20", "resampler.width=1280, it is 2048"]),
    (ResamplerHead, 768, {"depth": 2}, ["diffusers", "comfyui"], ["resampler.depth=4, it is 2"]),
    (ResamplerHead, 768, {"head_width": 32}, ["diffusers", "comfyui"], ["resampler.head_width=64"]),
    (ResamplerHead, 768, {"expansion": 2}, ["diffusers", "comfyui"], ["resampler.expansion=4"]),
    (ResamplerHead, 768, {"num_tokens": 8}, ["comfyui"], ["tokens.num_tokens=16, it is 8"]),
    (ResamplerHead, 768, {"heads": 6}, ["comfyui"], ["resampler.heads=12"]),
    (ResamplerHead, 768, {"width": 512}, ["comfyui"], ["resampler.width=768"]),
    (
        ResamplerHead,
        768,
        {"depth": 1, "expansion": 1, "heads": 1},
        ["diffusers", "comfyui"],
        ["resampler.depth=4", "resampler.expansion=4"],
    ),
]


@pytest.mark.parametrize(("cls", "context", "options", "blind", "words"), CASES, ids=str)
def test_what_a_reader_would_misread_is_refused(
    cls: type[Head], context: int, options: dict[str, Any], blind: list[str], words: list[str]
) -> None:
    head = make(cls, context, **options)
    for layout in set(LAYOUTS) - set(blind):
        check_layout(head, "decoupled", layout)
    for layout in blind:
        with pytest.raises(UserError, match=f"cannot be written for {layout}: .*adapter.layout=ipa") as caught:
            check_layout(head, "decoupled", layout)

        for word in words:
            assert f"{layout} assumes" in str(caught.value) and word in str(caught.value)


@pytest.mark.parametrize("cls", [GlobalHead, ResamplerHead, FullHead])
def test_a_simple_adapter_is_for_ipa_alone(cls: type[Head]) -> None:
    head = make(cls)
    check_layout(head, "simple", "ipa")
    for layout in ("diffusers", "comfyui"):
        with pytest.raises(UserError, match=f"simple adapter cannot be written for {layout}: no other program knows"):
            check_layout(head, "simple", layout)
    with pytest.raises(UserError, match=r"layout=kohya: one of diffusers, comfyui, ipa"):
        check_layout(head, "decoupled", "kohya")


@pytest.mark.parametrize(
    ("cls", "public", "other"),
    [(GlobalHead, "zeros", "blank"), (ResamplerHead, "blank", "zeros"), (FullHead, "blank", "zeros")],
)
def test_another_no_image_than_readers_take_is_a_warning(cls: type[Head], public: str, other: str) -> None:
    """The call that makes diffusers agree is tried in test_diffusers."""
    for layout in LAYOUTS:
        check_layout(make(cls, no_image=other), "decoupled", layout)
        assert other_no_image(make(cls, no_image=public), layout) is None
        warning = other_no_image(make(cls, no_image=other), layout)
        assert (warning is None) is (layout == "ipa")
        assert warning is None or (f"tokens.no_image={other}" in warning and "ip_adapter_image_embeds=" in warning)
