"""Recognising a file by names and shapes: all published ones at full size, gaps, files of others, heads of others."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from published_files import (
    CONTEXT,
    ENCODERS,
    HIDDEN,
    PUBLISHED,
    UNETS,
    Shapes,
    branches,
    count,
    full_head,
    named,
    resampler,
)
from torch import nn
from toy_family import TimeHead

from ipa.adapter.kinds import DecoupledAdapter
from ipa.errors import UserError
from ipa.export.adapter_file import identify, make_head
from ipa.export.heads import HEADS, HeadRow, read_global
from ipa.export.layouts import LAYOUTS, check_layout, misreadings
from ipa.export.loading import load_into
from ipa.export.published import check_fits, to_published, with_metadata
from ipa.export.reading import read_adapter
from ipa.export.storage import save_adapter
from ipa.families.cross_attention import find_hosts
from ipa.types import BaseWidths, EncoderWidths

TITLES = {"sd15": "Stable Diffusion 1.x", "sdxl": "Stable Diffusion XL"}
SD15 = PUBLISHED["ip-adapter_sd15"].shapes
PLUS = PUBLISHED["ip-adapter-plus_sd15"].shapes


@cache
def branches_of(base: str) -> DecoupledAdapter:
    """The branches that ipa plugs into a public base, without memory."""
    with torch.device("meta"):
        return DecoupledAdapter(find_hosts(UNet2DConditionModel(**UNETS[base])))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_identified_fits_and_ours_has_its_names_and_shapes(name: str) -> None:
    known = PUBLISHED[name]
    file = identify(known.shapes)

    assert (file.head, file.kind, file.num_tokens) == (known.kind, "decoupled", known.num_tokens)
    assert (file.context_width, list(file.hidden)) == (CONTEXT[known.base], HIDDEN[known.base])
    pooled, patch, _ = ENCODERS[known.encoder]
    assert file.feature_width == (pooled if known.kind == "global" else patch)
    assert (file.num_tensors, file.num_parameters) == (known.num_tensors, known.num_parameters)
    assert file.no_image == ("zeros" if known.kind == "global" else "blank")
    assert file.base == TITLES[known.base]
    assert f"{known.encoder}/14" in file.encoder
    with torch.device("meta"):
        head = make_head(file)
    published = to_published(nn.ModuleDict({"image_proj": head, "ip_adapter": branches_of(known.base)}).state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in published.items()} == known.shapes
    assert {tensor.dtype for tensor in published.values()} == {torch.float16}
    assert count(known.shapes) == known.num_parameters
    assert [misreadings(head, "decoupled", layout) for layout in LAYOUTS] == [[], [], []]
    encoder = {"ViT-H": EncoderWidths(1024, 1280, 257, 224), "ViT-bigG": EncoderWidths(1280, 1664, 257, 224)}
    as_files_have_them = dict(sorted(known.shapes.items()))  # 1, 11, 13 …
    base = BaseWidths(CONTEXT[known.base], HIDDEN[known.base])
    check_fits(identify(as_files_have_them), base, encoder[known.encoder], source="a", base="b", encoder="c")


@pytest.mark.parametrize(
    ("head", "kind", "options"),
    [
        ("global", "simple", {"num_tokens": 7, "no_image": "blank"}),
        (
            "fine_grained",
            "decoupled",
            {"width": 12, "heads": 3, "head_width": 8, "depth": 2, "expansion": 3, "num_tokens": 5},
        ),
        ("fine_grained", "simple", {"no_image": "zeros"}),
        ("full", "decoupled", {}),
    ],
    ids=str,
)
def test_our_own_files_show_all_sizes(head: str, kind: str, options: dict[str, Any]) -> None:
    """The sizes that shapes do not show are in the metadata."""
    model = tiny.make_model(head=head, kind=kind, **options)
    tensors = to_published(model.trainable.state_dict())
    metadata = with_metadata(tensors, model.describe())
    file = identify({name: tuple(tensor.shape) for name, tensor in tensors.items()}, metadata)
    made = make_head(file)

    assert (file.head, file.kind, bool(file.hidden)) == (head, kind, kind == "decoupled")
    assert (file.num_tokens, file.no_image) == (model.head.num_tokens, model.head.no_image)
    assert type(made) is type(model.head)
    for name in ("num_tokens", "context_width", "no_image", "width", "heads", "depth", "head_width", "expansion"):
        assert getattr(made, name, None) == getattr(model.head, name, None)
    made.load_state_dict(model.head.state_dict())


def test_metadata_says_how_to_read_the_file_and_keeps_what_a_training_knows() -> None:
    told = identify(PLUS, {"no_image": "zeros"}).metadata()
    expected = {"format": "ip-adapter", "head": "fine_grained", "kind": "decoupled", "num_tokens": "16"}
    expected |= {"features": "patches", "layer": "penultimate", "no_image": "zeros", "head_width": "64"}

    assert told.pop("ipa_version") and told == expected
    assert identify(SD15).metadata()["layer"] == "projected"
    tensors = {name: torch.empty(shape, device="meta") for name, shape in SD15.items()}
    metadata = with_metadata(tensors, {"base": "b", "step": "3", "licence": "CC0-1.0", "num_tokens": "99"})
    assert (metadata["base"], metadata["step"], metadata["licence"]) == ("b", "3", "CC0-1.0")
    assert metadata["num_tokens"] == "4"  # what the tensors say is so


def sd15_with(head: Shapes, **more: tuple[int, ...]) -> Shapes:
    return (
        named(head) | branches(HIDDEN["sd15"], 768) | {name.replace("__", "."): shape for name, shape in more.items()}
    )


FACE_ID = {"proj.0.weight": (1024, 512), "proj.0.bias": (1024,), "proj.2.weight": (3072, 1024), "proj.2.bias": (3072,)}
FOREIGN = {
    "an IP-Adapter FaceID,": sd15_with(FACE_ID | {"norm.weight": (768,), "norm.bias": (768,)}),
    "an IP-Adapter FaceID Plus,": sd15_with(FACE_ID | {"perceiver_resampler.proj_in.weight": (768, 1280)}),
    "a base model,": {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_the_files_of_others_are_named(what: str) -> None:
    with pytest.raises(UserError, match=r"^a\.safetensors is ") as caught:
        identify(FOREIGN[what], {}, "a.safetensors")

    assert what in str(caught.value)
    assert "which ipa does not read. It reads IP-Adapters (global, plus and full)" in str(caught.value)


def without(shapes: Shapes, *names: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in names}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({}, "is not an IP-Adapter that ipa reads: it has none of image_proj.proj.weight"),
        ({"unet.conv.weight": (3, 3)}, "but unet.conv.weight …"),
        (without(SD15, "image_proj.proj.bias"), "it lacks image_proj.proj.bias:"),
        (without(SD15, "ip_adapter.3.to_v_ip.weight"), "it lacks ip_adapter.3.to_v_ip.weight:"),
        (without(SD15, "ip_adapter.3.to_k_ip.weight"), "it has no ip_adapter.3.to_k_ip.weight"),
        (without(SD15, "image_proj.norm.weight", "image_proj.norm.bias"), "it has no image_proj.norm.weight"),
        (SD15 | {"ip_adapter.1.to_q_lora.down.weight": (4, 320)}, "also holds ip_adapter.1.to_q_lora.down.weight"),
        (SD15 | {"x": (1,), "y": (1,)}, "it also holds x and 1 more"),
        (
            SD15 | {"ip_adapter.5.to_v_ip.weight": (640, 1024)},
            "ip_adapter.5.to_v_ip.weight has the shape (640, 1024) instead of (640, 768)",
        ),
        (SD15 | {"image_proj.proj.weight": (3000, 1024)}, "has the shape (3000, 1024) instead of (2304, 1024)"),
        (SD15 | {"image_proj.proj.weight": (700, 1024)}, "num_tokens=0"),
        (without(PLUS, "image_proj.layers.2.0.to_q.weight"), "also holds image_proj.layers.3"),
        (sd15_with(resampler(768, 100, 768)), "is 100 wide, not a multiple of head_width=64"),
        (sd15_with(full_head(1280, 768) | {"proj.0.weight": (1024, 1280)}), "has the shape (1024, 1280)"),
    ],
)
def test_gaps_and_leftovers_are_named(shapes: Shapes, words: str) -> None:
    with pytest.raises(UserError, match=r"^a\.safetensors ") as caught:
        identify(shapes, {}, "a.safetensors")

    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"head_width": "wide"}, "its metadata says head_width=wide, which is not a size"),
        ({"head_width": "0"}, "its metadata says head_width=0"),
        ({"head_width": "100"}, "768 wide, not a multiple of head_width=100"),
        ({"no_image": "grey"}, "no_image=grey: give one of black, blank, zeros"),
    ],
    ids=str,
)
def test_metadata_that_makes_no_sense_is_refused(metadata: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=r"^a\.safetensors is not an IP-Adapter that ipa reads") as caught:
        identify(PLUS, metadata, "a.safetensors")

    assert words in str(caught.value)


def test_a_file_of_a_new_head_and_family_is_read_after_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With branches that have biases, as a family may give them; only ipa reads the file."""
    model, other, plain = (tiny.make_model() for _ in range(3))
    for each in (model, other, plain):
        each.trainable["image_proj"] = TimeHead(tiny.POOLED_WIDTH, tiny.CONTEXT_WIDTH)
    for branch in (*model.adapter.branches, *other.adapter.branches):
        branch.to_k_ip.bias = nn.Parameter(torch.randn(branch.to_k_ip.out_features))
    tensors = to_published(model.trainable.state_dict(), torch.float32)
    metadata = model.describe() | model.head.describe() | {"base_family": "toy", "branches": ""}
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"also holds image_proj\.time"):
        with_metadata(tensors, metadata)
    monkeypatch.setitem(HEADS, "time", HeadRow(TimeHead, "time-dependent", read_global))
    save_adapter(path, tensors, with_metadata(tensors, metadata))
    file = read_adapter(path).file
    load_into(other, path)

    assert (file.head, file.branches, list(file.hidden)) == ("time", "", tiny.HIDDEN)
    assert type(make_head(file)) is TimeHead
    assert file.describe().startswith("a time-dependent IP-Adapter for a base of other sizes")
    torch.testing.assert_close(other.trainable.state_dict(), model.trainable.state_dict(), rtol=0, atol=0)
    check_layout(model.head, "decoupled", "ipa")
    with pytest.raises(UserError, match="no other program knows this head"):
        check_layout(model.head, "decoupled", "diffusers")
    with pytest.raises(UserError, match="no other program knows adapters for this base"):
        check_layout(tiny.make_model().head, "decoupled", "diffusers", "toy")
    with pytest.raises(UserError, match=r"does not fit the branches of \w+: it also holds .*to_k_ip\.bias"):
        load_into(plain, path)
