"""Heads against diffusers' own projections, and against the sizes of the published files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from published_files import CONTEXT, ENCODERS, PUBLISHED
from torch import Tensor, nn

from ipa.adapter.heads import NO_IMAGE, FullHead, GlobalHead, Head, ResamplerHead
from ipa.errors import UserError
from ipa.types import EncoderWidths, Features

TINY = EncoderWidths(pooled=12, patch=24, num_patches=10, image_size_px=24)
CLASSES: dict[str, Any] = {"global": GlobalHead, "fine_grained": ResamplerHead, "full": FullHead}
SMALL = {"fine_grained": {"heads": 1}}
SIZES = {"ip-adapter-plus_sdxl_vit-h": {"width": 1280, "heads": 20}}


def moved(head: Head) -> Head:
    """Away from its start, where norms have no effect; in double precision, with weights that single precision has."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head.double()


def patches(batch: int = 2, **options: Any) -> Features:
    return Features(patches_BPF=torch.randn(batch, TINY.num_patches, TINY.patch, **options))


def make_head(kind: str, **options: Any) -> Head:
    return CLASSES[kind].fitting(TINY, 16, **SMALL.get(kind, {}), **options)


def theirs(head: Head) -> nn.Module:
    """diffusers' projection with the same weights, read by its own key map."""
    return (
        UNet2DConditionLoadersMixin()
        ._convert_ip_adapter_image_proj_to_diffusers(head.state_dict(), low_cpu_mem_usage=False)
        .double()
    )


@pytest.mark.parametrize(
    ("cls", "sizes", "num_tokens"),
    [
        (ResamplerHead, {"num_tokens": 5, "width": 128, "heads": 2}, 5),
        (ResamplerHead, {"num_tokens": 5, "width": 20, "heads": 3}, 5),
        (FullHead, {}, TINY.num_patches),
    ],
)
def test_tokens_are_those_of_diffusers(cls: Any, sizes: dict[str, int], num_tokens: int) -> None:
    """The global head is compared with its equation in tests/test_model.py."""
    head, features = moved(cls.fitting(TINY, 16, **sizes)), patches(dtype=torch.float64)
    tokens = head(features)

    assert tokens.shape == (2, num_tokens, 16)
    torch.testing.assert_close(tokens, theirs(head)(features.patches_BPF), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_head_that_fits_its_encoder_and_base_is_the_published_one(name: str) -> None:
    known = PUBLISHED[name]
    encoder = EncoderWidths(*ENCODERS[known.encoder], image_size_px=224)
    with torch.device("meta"):
        head = CLASSES[known.kind].fitting(encoder, CONTEXT[known.base], **SIZES.get(name, {}))
    shapes = {f"image_proj.{name}": tuple(tensor.shape) for name, tensor in head.state_dict().items()}

    assert shapes == {name: shape for name, shape in known.shapes.items() if name.startswith("image_proj.")}
    assert (head.num_tokens, head.context_width) == (known.num_tokens, CONTEXT[known.base])
    assert (head.uses, head.no_image) == (("pooled", "zeros") if known.kind == "global" else ("patches", "blank"))
    assert {module.eps for module in head.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


def test_the_resamplers_own_sizes_are_free() -> None:
    sizes = {"width": 20, "heads": 3, "depth": 2, "head_width": 8, "expansion": 3}
    head = ResamplerHead.fitting(TINY, 16, num_tokens=5, **sizes)
    shapes = {name: tuple(tensor.shape) for name, tensor in head.layers[1].state_dict().items()}

    assert len(head.layers) == 2 and head(patches()).shape == (2, 5, 16)
    assert (shapes["0.to_q.weight"], shapes["0.to_kv.weight"], shapes["1.1.weight"]) == ((24, 20), (48, 20), (60, 20))
    assert ResamplerHead.fitting(TINY, 16).width == 16  # that of the base, unless one is given


def features(dtype: torch.dtype = torch.float32) -> Features:
    return Features(torch.randn(2, TINY.pooled, dtype=dtype), patches(dtype=dtype).patches_BPF)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_sample_is_turned_into_tokens_by_itself_at_any_time_and_precision(kind: str) -> None:
    head, given = make_head(kind), features()
    tokens: Tensor = head(given)
    second: Tensor = head(given.map(lambda x: x[1:]))

    torch.testing.assert_close(tokens[1:], second, rtol=0, atol=1e-6)
    assert (tokens[0] - second[0]).abs().max() > 0.01
    assert torch.equal(tokens, head(given, torch.tensor([1, 999])))
    assert head(features(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("kind", CLASSES)
def test_no_image_is_one_of_three_and_there_are_tokens(kind: str) -> None:
    assert {make_head(kind, no_image=name).no_image for name in NO_IMAGE} == {"black", "blank", "zeros"}
    with pytest.raises(UserError, match=r"tokens\.no_image=grey: give one of black, blank, zeros"):
        make_head(kind, no_image="grey")
    if kind != "full":  # which has as many as its encoder has patches
        with pytest.raises(UserError, match=r"tokens\.num_tokens=0: .*the paper has 4 .* 16"):
            make_head(kind, num_tokens=0)
