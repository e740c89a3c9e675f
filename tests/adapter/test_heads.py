"""Heads against their equations, against diffusers' own projections, and against the sizes of the published files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from torch import Tensor, nn

from ipa.adapter.heads import FullHead, GlobalHead, Head, ResamplerHead
from ipa.types import EncoderWidths, Features

TINY = EncoderWidths(pooled=12, patch=24, num_patches=10, image_size_px=24)
VIT_H = EncoderWidths(pooled=1024, patch=1280, num_patches=257, image_size_px=224)
VIT_BIGG = EncoderWidths(pooled=1280, patch=1664, num_patches=257, image_size_px=224)
# inner widths of the cross-attention layers: down, up, mid
SD15 = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
SDXL = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10

# file, head, encoder, context, inner widths, sizes of the head → its tokens, and tensors and parameters of the file
PUBLISHED = [
    ("ip-adapter_sd15", GlobalHead, VIT_H, 768, SD15, {}, 4, 36, 22_319_616),
    ("ip-adapter_sd15_vit-G", GlobalHead, VIT_BIGG, 768, SD15, {}, 4, 36, 23_106_048),
    ("ip-adapter-full-face_sd15", FullHead, VIT_H, 768, SD15, {}, 257, 38, 21_794_304),
    ("ip-adapter-plus_sd15", ResamplerHead, VIT_H, 768, SD15, {}, 16, 83, 49_087_488),
    ("ip-adapter_sdxl", GlobalHead, VIT_BIGG, 2048, SDXL, {}, 4, 144, 351_285_248),
    ("ip-adapter_sdxl_vit-h", GlobalHead, VIT_H, 2048, SDXL, {}, 4, 144, 349_188_096),
    (
        "ip-adapter-plus_sdxl_vit-h",
        ResamplerHead,
        VIT_H,
        2048,
        SDXL,
        {"width": 1280, "heads": 20},
        16,
        191,
        423_748_864,
    ),
]


def moved(head: Head) -> Head:
    """Away from its start, where norms have no effect; in double precision, with weights that single precision has."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head.double()


def patches(batch: int = 2, **options: Any) -> Features:
    return Features(patches_BPF=torch.randn(batch, TINY.num_patches, TINY.patch, **options))


def theirs(head: Head) -> nn.Module:
    """diffusers' projection with the same weights, read by its own key map."""
    return (
        UNet2DConditionLoadersMixin()
        ._convert_ip_adapter_image_proj_to_diffusers(head.state_dict(), low_cpu_mem_usage=False)
        .double()
    )


def test_tokens_are_a_normalised_linear_map_of_the_pooled_embedding() -> None:
    head = GlobalHead(embedding_width=12, context_width=16, num_tokens=3)
    pooled = torch.randn(2, 12)
    rows = (pooled @ head.proj.weight.T + head.proj.bias).view(2, 3, 16)
    centred = rows - rows.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    torch.testing.assert_close(head(Features(pooled_BE=pooled)), expected)


@pytest.mark.parametrize("sizes", [{"width": 128, "heads": 2}, {"width": 20, "heads": 3}])
def test_the_resampler_is_that_of_diffusers(sizes: dict[str, int]) -> None:
    head, features = moved(ResamplerHead.fitting(TINY, 16, num_tokens=5, **sizes)), patches(dtype=torch.float64)
    tokens = head(features)

    assert tokens.shape == (2, 5, 16)
    torch.testing.assert_close(tokens, theirs(head)(features.patches_BPF), rtol=0, atol=1e-9)


def test_the_full_head_is_that_of_diffusers() -> None:
    head, features = moved(FullHead.fitting(TINY, 16)), patches(dtype=torch.float64)
    tokens = head(features)

    assert tokens.shape == (2, TINY.num_patches, 16)
    torch.testing.assert_close(tokens, theirs(head)(features.patches_BPF), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["latents", "layers.1.0.norm1.bias", "layers.3.0.to_kv.weight", "layers.3.1.3.weight"])
def test_every_part_of_the_resampler_is_heard(name: str) -> None:
    head, features = moved(ResamplerHead.fitting(TINY, 16, num_tokens=5, width=20, heads=1)), patches()
    before = head(features)
    with torch.no_grad():
        head.get_parameter(name).mul_(2).add_(torch.randn_like(head.get_parameter(name)))

    assert (head(features) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "head", "encoder", "context", "hidden", "sizes", "num_tokens", "tensors", "parameters"), PUBLISHED
)
def test_a_head_fits_its_encoder_and_base_as_the_published_file_does(
    name: str,
    head: Any,
    encoder: EncoderWidths,
    context: int,
    hidden: list[int],
    sizes: dict[str, int],
    num_tokens: int,
    tensors: int,
    parameters: int,
) -> None:
    with torch.device("meta"):
        made = head.fitting(encoder, context, **sizes)

    assert (made.num_tokens, made.context_width) == (num_tokens, context)
    assert len(made.state_dict()) + 2 * len(hidden) == tensors
    assert sum(p.numel() for p in made.parameters()) + 2 * context * sum(hidden) == parameters


def test_the_head_is_the_published_one() -> None:
    with torch.device("meta"):
        head = GlobalHead(embedding_width=1024, context_width=768)

    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    assert shapes == {"proj.weight": (3072, 1024), "proj.bias": (3072,), "norm.weight": (768,), "norm.bias": (768,)}
    assert (head.uses, head.no_image, head.norm.eps) == ("pooled", "zeros", 1e-5)


def test_the_resampler_is_the_published_one() -> None:
    with torch.device("meta"):
        head = ResamplerHead.fitting(VIT_H, 768)
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    layers = {name: shape for name, shape in shapes.items() if name.startswith("layers.")}
    normed = [f"{norm}.{kind}" for norm in ("0.norm1", "0.norm2", "1.0") for kind in ("weight", "bias")]
    layer = dict.fromkeys(normed, (768,))
    layer |= {"0.to_q.weight": (768, 768), "0.to_kv.weight": (1536, 768), "0.to_out.weight": (768, 768)}
    layer |= {"1.1.weight": (3072, 768), "1.3.weight": (768, 3072)}

    assert layers == {f"layers.{i}.{name}": shape for i in range(4) for name, shape in layer.items()}
    assert {name: shape for name, shape in shapes.items() if name not in layers} == {
        "latents": (1, 16, 768),
        **{"proj_in.weight": (768, 1280), "proj_in.bias": (768,)},
        **{"proj_out.weight": (768, 768), "proj_out.bias": (768,)},
        **{"norm_out.weight": (768,), "norm_out.bias": (768,)},
    }
    assert (head.uses, head.no_image, head.norm_out.eps) == ("patches", "blank", 1e-5)


def test_the_full_head_is_the_published_one() -> None:
    with torch.device("meta"):
        head = FullHead.fitting(VIT_H, 768)

    assert {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()} == {
        **{"proj.0.weight": (1280, 1280), "proj.0.bias": (1280,)},
        **{"proj.2.weight": (768, 1280), "proj.2.bias": (768,)},
        **{"proj.3.weight": (768,), "proj.3.bias": (768,)},
    }
    assert (head.uses, head.no_image) == ("patches", "blank")


def test_the_resamplers_own_sizes_are_free() -> None:
    sizes = {"width": 20, "heads": 3, "depth": 2, "head_width": 8, "expansion": 3}
    head = ResamplerHead.fitting(TINY, 16, num_tokens=5, **sizes)
    shapes = {name: tuple(tensor.shape) for name, tensor in head.layers[1].state_dict().items()}

    assert len(head.layers) == 2 and head(patches()).shape == (2, 5, 16)
    assert (shapes["0.to_q.weight"], shapes["0.to_kv.weight"], shapes["1.1.weight"]) == ((24, 20), (48, 20), (60, 20))
    assert ResamplerHead.fitting(TINY, 16).width == 16  # that of the base, unless one is given


HEADS = {
    "global": lambda **options: GlobalHead.fitting(TINY, 16, **options),
    "fine_grained": lambda **options: ResamplerHead.fitting(TINY, 16, heads=1, **options),
    "full": lambda **options: FullHead.fitting(TINY, 16, **options),
}


def features(dtype: torch.dtype = torch.float32) -> Features:
    return Features(torch.randn(2, TINY.pooled, dtype=dtype), patches(dtype=dtype).patches_BPF)


@pytest.mark.parametrize("kind", HEADS)
def test_the_time_makes_no_difference(kind: str) -> None:
    head, given = HEADS[kind](), features()

    assert torch.equal(head(given), head(given, torch.tensor([1, 999])))


@pytest.mark.parametrize("kind", HEADS)
def test_features_in_half_precision_are_read(kind: str) -> None:
    assert HEADS[kind]()(features(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("kind", HEADS)
def test_a_sample_is_turned_into_tokens_by_itself(kind: str) -> None:
    head, given = HEADS[kind](), features()
    second: Tensor = head(given.map(lambda x: x[1:]))

    torch.testing.assert_close(head(given)[1:], second, rtol=0, atol=1e-6)
    assert (head(given)[0] - second[0]).abs().max() > 0.01


@pytest.mark.parametrize("kind", HEADS)
def test_what_stands_for_no_image_is_one_of_two(kind: str) -> None:
    assert {HEADS[kind](no_image=name).no_image for name in ("blank", "zeros")} == {"blank", "zeros"}
    with pytest.raises(ValueError, match=r"tokens\.no_image=black: give one of blank, zeros"):
        HEADS[kind](no_image="black")


@pytest.mark.parametrize("kind", ["global", "fine_grained"])
@pytest.mark.parametrize("num_tokens", [0, -1])
def test_no_tokens_at_all_is_refused(kind: str, num_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"tokens\.num_tokens={num_tokens}: .*the paper has 4 .* 16"):
        HEADS[kind](num_tokens=num_tokens)
