import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_prompt_tokens as parts
import torch
import transformers
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SwinConfig

from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.seecoder import (
    Decoder,
    QueryTransformer,
    SeeCoder,
    SemanticContextEncoder,
    SwinBackbone,
    rename,
)
from ipa.families.stable_diffusion import StableDiffusion
from ipa.weights import count_parameters

DEPTHS = [1, 2, 1, 2]
WIDTH = 32  # the decoder's norms have 32 groups


def make_coder() -> Any:
    decoder, queries = Decoder([16, 32, 64], WIDTH, 24, num_layers=2), QueryTransformer(WIDTH, 40, 9, num_layers=4)
    return SemanticContextEncoder(SwinBackbone(8, DEPTHS, [1, 2, 2, 4], window=2), decoder, queries).eval()


def make_family() -> StableDiffusion:
    """A base whose context is as wide as the tokens; the text encoder, narrower, plays no part."""
    family = tiny.make_family()
    family.unet = UNet2DConditionModel.from_config({**family.unet.config, "cross_attention_dim": WIDTH})
    for host in family.hosts():
        parts.loud(host.attention)
    return family


@pytest.fixture
def method() -> SeeCoder:
    return SeeCoder(make_family(), make_coder(), reference_size_px=64)


def test_it_keeps_what_every_method_promises(method: SeeCoder) -> None:
    parts.check_promises(method)


def both(*names: str) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def attention(name: str) -> list[str]:
    return [f"{name}.in_proj_weight", f"{name}.in_proj_bias", *both(f"{name}.out_proj")]


def published_names(depths: list[int], decoder_layers: int = 6, query_layers: int = 9) -> list[str]:
    """As in seecoder-v1-0.safetensors behind ``ctx.image.``."""
    swin = [*both("patch_embed.proj", "patch_embed.norm"), *both(*(f"norm{i}" for i in range(len(depths))))]
    for i, depth in enumerate(depths):
        for block in (f"layers.{i}.blocks.{j}" for j in range(depth)):
            swin += both(*(f"{block}.{part}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2")))
            swin += both(f"{block}.mlp.fc1", f"{block}.mlp.fc2")
            swin += [f"{block}.attn.relative_position_{kind}" for kind in ("bias_table", "index")]
        if i + 1 < len(depths):
            swin += [*both(f"layers.{i}.downsample.norm"), f"layers.{i}.downsample.reduction.weight"]
    decoder = ["level_embed"]
    for level in ("res3", "res4", "res5"):
        decoder += both(f"inproj_layers.{level}.0", f"inproj_layers.{level}.1", f"lateral_layers.{level}.norm")
        decoder.append(f"lateral_layers.{level}.weight")
    for layer in (f"transformer.layers.{i}" for i in range(decoder_layers)):
        decoder += attention(f"{layer}.self_attn")
        decoder += both(*(f"{layer}.{part}" for part in ("norm1", "linear1", "linear2", "norm2")))
    queries = ["init_query.weight", "query_pos_embedding.weight", "level_embed.weight"]
    for i in range(query_layers):
        cross, own, forward = (f"transformer_{kind}_layers.{i}" for kind in ("crossatt", "selfatt", "feedforward"))
        queries += [*attention(f"{cross}.multihead_attn"), *attention(f"{own}.self_attn")]
        queries += both(f"{cross}.norm", f"{own}.norm", f"{forward}.norm", f"{forward}.linear1", f"{forward}.linear2")
    parts_of = {"imencoder": swin, "imdecoder": decoder, "qtransformer": queries}
    return [f"{part}.{name}" for part, names in parts_of.items() for name in names]


def published(module: nn.Module, *sizes: Any) -> dict[str, Tensor]:
    """The weights under their published names."""
    theirs = published_names(*sizes)
    names = dict(zip(rename(dict.fromkeys(theirs, torch.zeros(1))), theirs, strict=True))
    return {names[name]: weight for name, weight in module.state_dict().items()}


def test_the_encoder_at_full_size_has_the_published_weights() -> None:
    """294 M: at four bytes each the 1.18 GB of the published file."""
    with torch.device("meta"):
        coder = SemanticContextEncoder.large()
    counts = [count_parameters(part) for part in (coder.imencoder, coder.imdecoder, coder.qtransformer)]
    assert counts == [195_201_204, 27_783_168, 71_130_624]
    assert sum(counts) == count_parameters(coder) == 294_114_996
    assert coder(torch.zeros(2, 3, 512, 512, device="meta")).shape == (2, 148, 768)
    assert published(coder, [2, 2, 18, 2]).keys() == set(published_names([2, 2, 18, 2]))


# transformers' names of a block's parts; it splits ``qkv``
THEIRS = {
    r"patch_embed\.proj": "swin.embeddings.patch_embeddings.projection",
    r"patch_embed\.norm": "swin.embeddings.norm",
    r"layers\.": "swin.encoder.layers.",
    r"^norm(\d)": lambda found: f"hidden_states_norms.stage{int(found[1]) + 1}",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"attn\.proj": "attention.o_proj",
    r"attn\.relative": "attention.relative_position_bias.relative",
}


def transformers_like(published: dict[str, Tensor], config: SwinConfig) -> transformers.SwinBackbone:
    theirs = transformers.SwinBackbone(config).eval()
    state = {name: weight for name, weight in theirs.state_dict().items() if name.startswith("swin.layernorm")}
    for name, weight in published.items():
        for pattern, new in THEIRS.items():
            name = re.sub(pattern, new, name)
        if "qkv" in name:
            parts_of = zip("qkv", weight.chunk(3), strict=True)
            state |= {name.replace("attn.qkv", f"attention.{part}_proj"): own for part, own in parts_of}
        elif not name.endswith("position_index"):
            state[name] = weight
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("size", [(128, 128), (120, 88)])
@torch.no_grad()
def test_the_backbone_is_that_of_transformers(size: tuple[int, int]) -> None:
    """Another implementation, with the same weights; also where the window does not divide a map."""
    width, depths, heads, window = 8, [2, 2, 2], [1, 2, 4], 4
    ours = SwinBackbone(width, depths, heads, window).eval()
    for parameter in ours.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    config = SwinConfig(embed_dim=width, depths=depths, num_heads=heads, window_size=window)
    config.out_features = ["stage1", "stage2", "stage3"]
    image = torch.randn(2, 3, *size)
    state = published(nn.ModuleDict({"imencoder": ours}), depths)
    theirs = transformers_like(
        {name.removeprefix("imencoder."): each for name, each in state.items() if "imencoder." in name}, config
    )
    expected = theirs(image).feature_maps

    for found, map_BCHW in zip(ours(image), expected, strict=True):
        torch.testing.assert_close(found, map_BCHW, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_decoder_sees_every_position_alone() -> None:
    """As in the published code with a batch of one: a position depends neither on others nor on the batch."""
    decoder = make_coder().imdecoder.transformer
    x_1PD = torch.randn(1, 6, WIDTH)
    alone = torch.cat([decoder(x_1PD[:, i : i + 1]) for i in range(6)], 1)
    torch.testing.assert_close(decoder(x_1PD), alone)


@torch.no_grad()
def test_the_maps_are_decoded_with_their_own_level() -> None:
    """``level_embed`` counts from the smallest map, and what goes around the transformer is added to what passes it."""
    decoder = make_coder().imdecoder
    maps = [torch.randn(1, wide, side, side) for wide, side in ((16, 8), (32, 4), (64, 2))]
    before = decoder(maps)
    decoder.level_embed[0].add_(1)
    after = decoder(maps)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False]
    assert [tuple(made.shape) for made in after] == [(1, WIDTH, side, side) for side in (8, 4, 2)]


@torch.no_grad()
def test_global_queries_see_the_picture_through_the_local_ones() -> None:
    queries = make_coder().qtransformer
    maps = [torch.randn(2, WIDTH, side, side) for side in (4, 2, 1)]

    def changed(layers: int) -> Tensor:
        """Which of the nine tokens the picture changes, after so many layers."""
        for name in ("crossatt", "selfatt", "feedforward"):
            full = getattr(queries, f"transformer_{name}_layers")
            setattr(queries, f"transformer_{name}_layers", full[:layers])
        tokens_BTD = queries(maps)
        return (tokens_BTD[0] - tokens_BTD[1]).abs().amax(-1) > 1e-6

    assert changed(layers=4).all()
    assert changed(layers=1).all()
    for layer in queries.transformer_selfatt_layers:  # the only way from the local queries to the global ones
        layer.attention.out_proj.weight.zero_()
    assert changed(layers=1).tolist() == [False] * 4 + [True] * 5


def test_tokens_of_plain_pixels_take_the_texts_place_and_no_image_is_zeros(method: SeeCoder) -> None:
    """Pixels from 0 to 1, without normalisation."""
    found = []
    method.adapter.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    images = [torch.full((3, 9, 9), level, dtype=torch.uint8) for level in (255, 0)]
    positive, negative = method.states([Prompt(image_3HW, "", 0) for image_3HW in images])
    (image_B3HW,) = found

    assert image_B3HW.shape == (2, 3, 64, 64) and positive.shape == (2, 9, WIDTH)
    torch.testing.assert_close(image_B3HW.mean((1, 2, 3)), torch.tensor([1.0, 0.0]))
    assert torch.equal(negative, torch.zeros_like(positive))
    assert method.trained == count_parameters(method.adapter)


def test_a_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SemanticContextEncoder, "large", make_coder)
    made, base, file = make_coder(), tmp_path / "base", tmp_path / "seecoder.safetensors"
    make_family().pipeline().save_pretrained(base)
    state = published(made, DEPTHS, 2, 4)
    save_file({f"ctx.image.{name}": weight.contiguous() for name, weight in state.items()}, file)

    method = SeeCoder.from_pretrained(str(base), str(file), dtype="float32")
    loaded = method.adapter.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in made.state_dict().items())
    assert method.source == f"{file} on {base}"
