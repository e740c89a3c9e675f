"""The published layout: names and shapes at full size, both directions inverse, misfits named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ipa.adapter.heads import GlobalHead
from ipa.adapter.kinds import DecoupledAdapter
from ipa.checkpoint import load_adapter, read_shapes, save_adapter
from ipa.export.published import check_fits, check_readable_elsewhere, from_published, to_published, token_count
from ipa.families.cross_attention import find_hosts
from ipa.model import IPAdapterModel

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# numbers 1, 3, 5 … 31: down, up, mid last
SD15_HIDDEN = [320, 320, 640, 640, 1280, 1280] + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
SD15_BYTES = 44_642_768


def sd15_shapes(pooled_width: int = 1024) -> dict[str, tuple[int, ...]]:
    """The published file for Stable Diffusion 1.5, by hand."""
    head = {"proj.weight": (4 * 768, pooled_width), "proj.bias": (4 * 768,), "norm.weight": (768,), "norm.bias": (768,)}
    branches = {
        f"ip_adapter.{number}.to_{kind}_ip.weight": (hidden, 768)
        for number, hidden in zip(range(1, 32, 2), SD15_HIDDEN, strict=True)
        for kind in "kv"
    }
    return {f"image_proj.{name}": shape for name, shape in head.items()} | branches


@pytest.fixture(scope="module")
def sd15() -> nn.ModuleDict:
    """The trainable set for SD 1.5 with ViT-H, without memory."""
    with torch.device("meta"):
        hosts = find_hosts(UNet2DConditionModel(**SD15_UNET))
        return nn.ModuleDict({"image_proj": GlobalHead(1024, 768), "ip_adapter": DecoupledAdapter(hosts)})


def test_the_adapter_of_sd15_has_the_published_size(sd15: nn.ModuleDict) -> None:
    assert sum(parameter.numel() for parameter in sd15.parameters()) == 22_319_616
    assert len(sd15.state_dict()) == 36


def test_the_adapter_of_sd15_has_the_published_names_and_shapes(sd15: nn.ModuleDict) -> None:
    published = to_published(sd15.state_dict())

    assert {name: tuple(tensor.shape) for name, tensor in published.items()} == sd15_shapes()
    assert {tensor.dtype for tensor in published.values()} == {torch.float16}


def test_the_file_of_sd15_has_the_published_length_to_the_byte(sd15: nn.ModuleDict) -> None:
    published = to_published(sd15.state_dict())
    content = safetensors.torch.save(
        {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in published.items()}
    )

    assert len(content) == SD15_BYTES


def test_numbers_are_the_places_among_all_attention_processors(model: IPAdapterModel) -> None:
    published = to_published(model.trainable.state_dict(), torch.float32)
    for number, name in enumerate(model.family.unet.attn_processors):
        key = f"ip_adapter.{number}.to_k_ip.weight"
        assert (key in published) is name.endswith("attn2.processor")
        if key in published:
            assert (
                len(published[key])
                == model.family.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            )


def test_both_directions_are_inverse(model: IPAdapterModel) -> None:
    state = model.trainable.state_dict()
    back = from_published(to_published(state, torch.float32))

    assert list(back) == list(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_export_import_export_is_the_identity(model: IPAdapterModel, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    metadata = {"step": "7"}
    save_adapter(first, to_published(model.trainable.state_dict()), metadata)
    other = tiny.make_model()
    other.trainable.load_state_dict(from_published(load_adapter(first)[0]))
    save_adapter(second, to_published(other.trainable.state_dict()), metadata)

    assert first.read_bytes() == second.read_bytes()
    assert {parameter.dtype for parameter in other.trainable.parameters()} == {torch.float32}


def test_files_that_mix_types_are_read(model: IPAdapterModel) -> None:
    published = to_published(model.trainable.state_dict())
    published = {
        name: tensor.float() if name.startswith("image_proj.") else tensor for name, tensor in published.items()
    }

    assert {tensor.dtype for tensor in from_published(published).values()} == {torch.float32}


def test_tokens_are_counted_from_the_shapes(tmp_path: Path) -> None:
    for tokens in (1, 4, 7):
        model = tiny.make_model(num_tokens=tokens)
        save_adapter(tmp_path / "adapter.safetensors", to_published(model.trainable.state_dict()), {})
        assert token_count(read_shapes(tmp_path / "adapter.safetensors")) == tokens


def test_a_number_of_tokens_that_others_would_misread_is_refused() -> None:
    check_readable_elsewhere(tiny.make_model().head)
    with pytest.raises(ValueError, match=r"tokens\.num_tokens=7: diffusers .* assume 4 tokens"):
        check_readable_elsewhere(tiny.make_model(num_tokens=7).head)


FITTING = {
    "source": "a.safetensors",
    "context_width": 768,
    "pooled_width": 1024,
    "encoder": "ViT-H-14",
    "hidden": SD15_HIDDEN,
}
SDXL_HIDDEN = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10


def complaint(shapes: dict[str, tuple[int, ...]], **changed: Any) -> str:
    with pytest.raises(ValueError, match=r"^a\.safetensors ") as caught:
        check_fits(shapes, **{**FITTING, **changed})
    return str(caught.value)


def test_what_fits_is_accepted() -> None:
    check_fits(sd15_shapes(), **FITTING)
    reordered = dict(sorted(sd15_shapes().items()))  # as files have them: 1, 11, 13 …
    check_fits(reordered, **FITTING)


def test_an_encoder_of_another_width_is_named() -> None:
    message = complaint(sd15_shapes(), encoder="ViT-bigG-14", pooled_width=1280)

    assert "image embeddings of width 1024, the encoder ViT-bigG-14 gives 1280" in message
    assert "metadata" in message


def test_another_context_width_is_named() -> None:
    assert "tokens have width 768, the base's cross-attention reads 1024" in complaint(
        sd15_shapes(), context_width=1024
    )
    # 4 tokens of 768 would also divide into tokens of 512
    assert "tokens have width 768, the base's cross-attention reads 512" in complaint(sd15_shapes(), context_width=512)


def test_another_number_of_layers_is_named() -> None:
    message = complaint(sd15_shapes(), hidden=SDXL_HIDDEN)

    assert "it has 16 layers of widths [320, 640, 1280], the base 70 of [640, 1280]" in message


def test_the_same_layers_in_another_order_are_named() -> None:
    message = complaint(sd15_shapes(), hidden=sorted(SD15_HIDDEN))

    assert "in another order" in message


def test_all_misfits_are_told_at_once() -> None:
    message = complaint(sd15_shapes(), context_width=2048, pooled_width=1280, encoder="ViT-bigG-14", hidden=SDXL_HIDDEN)

    assert all(part in message for part in ("width 1024", "width 768", "16 layers"))


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"unet.conv_in.weight": (320, 4, 3, 3)},
        {
            "image_proj.latents": (1, 16, 768),
            "image_proj.proj_in.weight": (768, 1280),
            "ip_adapter.1.to_k_ip.weight": (320, 768),
        },
    ],
    ids=["empty", "a base", "fine-grained"],
)
def test_a_file_that_is_no_global_adapter_is_named(shapes: dict[str, tuple[int, ...]]) -> None:
    assert "not a global IP-Adapter in the published layout" in complaint(shapes)


def test_widths_of_a_tiny_base_fit_its_own_adapter(model: IPAdapterModel) -> None:
    published = to_published(model.trainable.state_dict())
    check_fits(
        {name: tuple(tensor.shape) for name, tensor in published.items()},
        source="a.safetensors",
        context_width=model.family.context_width,
        pooled_width=model.encoder.pooled_width,
        encoder="tiny",
        hidden=tiny.HIDDEN,
    )
