"""The published layout: numbers as diffusers counts them, both directions inverse, misfits named."""

from functools import cache

import pytest
import tiny
import torch
from published_files import HIDDEN, PUBLISHED
from torch import Tensor

from ipa.errors import UserError
from ipa.export.adapter_file import identify
from ipa.export.published import check_fits, from_published, to_published
from ipa.types import BaseWidths, EncoderWidths


@cache
def state_of(head: str, kind: str = "decoupled") -> dict[str, Tensor]:
    return tiny.shake(tiny.make_model(head=head, kind=kind)).trainable.state_dict()


@pytest.mark.parametrize(("head", "kind"), [("global", "simple"), ("fine_grained", "decoupled"), ("full", "decoupled")])
def test_both_directions_are_inverse(head: str, kind: str) -> None:
    state = state_of(head, kind)
    back = from_published(to_published(state, torch.float32))

    assert list(back) == list(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())


SD15 = BaseWidths(768, HIDDEN["sd15"])
SD21 = BaseWidths(1024, HIDDEN["sd15"])
SDXL = BaseWidths(2048, HIDDEN["sdxl"])
ENCODER_H = EncoderWidths(1024, 1280, 257, 224)
ENCODER_BIGG = EncoderWidths(1280, 1664, 257, 224)
RESNET = EncoderWidths(1024, 0, 0, 224)
VIT_H, VIT_BIGG = "OpenCLIP ViT-H/14 (laion2b_s32b_b79k)", "OpenCLIP ViT-bigG/14 (laion2b_s39b_b160k)"
NAMES = {"source": "a.safetensors", "base": "my/base", "encoder": "my-encoder"}


def complaint(name: str, base: BaseWidths, encoder: EncoderWidths) -> str:
    with pytest.raises(UserError, match=r"^a\.safetensors is a ") as caught:
        check_fits(identify(PUBLISHED[name].shapes), base, encoder, **NAMES)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "base", "encoder", "expected"),
    [
        ("ip-adapter_sd15", SD15, ENCODER_BIGG, f"of width 1280 as {VIT_BIGG}, the adapter reads 1024: give {VIT_H}"),
        ("ip-adapter_sdxl", SDXL, ENCODER_H, f"of width 1024 as {VIT_H}, the adapter reads 1280: give {VIT_BIGG}"),
        ("ip-adapter-plus_sd15", SD15, ENCODER_BIGG, f"patch features of width 1664 as {VIT_BIGG}, the adapter reads"),
        ("ip-adapter-plus_sd15", SD15, RESNET, f"the encoder my-encoder gives no patch features: give {VIT_H}"),
        (
            "ip-adapter-full-face_sd15",
            SD15,
            ENCODER_H._replace(num_patches=50),
            "gives 50 patches, the adapter reads 257",
        ),
        ("ip-adapter_sd15", SD21, ENCODER_H, "16 layers of context width 1024 (Stable Diffusion 2.x)"),
        ("ip-adapter_sd15", SDXL, ENCODER_H, "70 layers of context width 2048 (Stable Diffusion XL)"),
        ("ip-adapter-plus_sdxl_vit-h", SD15, ENCODER_H, "16 layers of context width 768 (Stable Diffusion 1.x)"),
        ("ip-adapter_sd15", SD15._replace(hosts=sorted(SD15.hosts)), ENCODER_H, "as the adapter has, but in another"),
        ("ip-adapter_sd15", SD15._replace(hosts=[320] * 16), ENCODER_H, "but of other inner widths ([320] and [320, "),
        ("ip-adapter-plus_sdxl_vit-h", SD15, RESNET, f"context width 768.*no patch features: give {VIT_H}"),
    ],
)
def test_a_misfit_is_named(name: str, base: BaseWidths, encoder: EncoderWidths, expected: str) -> None:
    """All at once, if there are several."""
    message = complaint(name, base, encoder)
    assert all(words in message for words in expected.split(".*"))
