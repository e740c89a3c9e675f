"""A transformer in a file of its own, under the names of the original code: the inverse of what diffusers reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_flow
import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel
from safetensors.torch import save_file
from test_quantization import rounded, write_gguf
from torch import Tensor

from ipa.errors import UserError
from ipa.families.transformer_file import PREFIX, in_names_of_diffusers

Names = Sequence[tuple[str, str]]
NUMBER = r"\.(\d+)\."
FLUX: Names = [
    (r"time_text_embed\.timestep_embedder\.", "time_in."),
    (r"time_text_embed\.text_embedder\.", "vector_in."),
    (r"time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"linear_1\.", "in_layer."),
    (r"linear_2\.", "out_layer."),
    (r"distilled_guidance_layer\.norms\.(\d+)\.weight", r"distilled_guidance_layer.norms.\1.scale"),
    (r"context_embedder\.", "txt_in."),
    (r"x_embedder\.", "img_in."),
    (rf"single_transformer_blocks{NUMBER}norm\.linear", r"single_blocks.\1.modulation.lin"),
    (rf"single_transformer_blocks{NUMBER}(attn\.to_[qkv]|proj_mlp)", r"single_blocks.\1.linear1"),
    (rf"single_transformer_blocks{NUMBER}attn\.(norm_[qk])", r"single_blocks.\1.norm.\2"),
    (rf"single_transformer_blocks{NUMBER}proj_out", r"single_blocks.\1.linear2"),
    (rf"transformer_blocks{NUMBER}norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (rf"transformer_blocks{NUMBER}norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (rf"transformer_blocks{NUMBER}attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv"),
    (rf"transformer_blocks{NUMBER}attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv"),
    (rf"transformer_blocks{NUMBER}attn\.(norm_[qk])", r"double_blocks.\1.img_attn.norm.\2"),
    (rf"transformer_blocks{NUMBER}attn\.norm_added_([qk])", r"double_blocks.\1.txt_attn.norm.norm_\2"),
    (r"norm\.norm_q\.weight", "norm.query_norm.scale"),
    (r"norm\.norm_k\.weight", "norm.key_norm.scale"),
    (rf"transformer_blocks{NUMBER}ff\.net", r"double_blocks.\1.img_mlp"),
    (rf"transformer_blocks{NUMBER}ff_context\.net", r"double_blocks.\1.txt_mlp"),
    (r"mlp\.0\.proj", "mlp.0"),
    (rf"transformer_blocks{NUMBER}attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (rf"transformer_blocks{NUMBER}attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
]
SD3: Names = [
    (r"pos_embed\.proj", "x_embedder.proj"),
    (r"pos_embed\.pos_embed", "pos_embed"),
    (r"time_text_embed\.timestep_embedder\.", "t_embedder.mlp."),
    (r"time_text_embed\.text_embedder\.", "y_embedder.mlp."),
    (r"linear_1\.", "0."),
    (r"linear_2\.", "2."),
    (rf"transformer_blocks{NUMBER}(attn2?)\.to_[qkv]", r"joint_blocks.\1.x_block.\2.qkv"),
    (rf"transformer_blocks{NUMBER}attn\.add_[qkv]_proj", r"joint_blocks.\1.context_block.attn.qkv"),
    (rf"transformer_blocks{NUMBER}(attn2?)\.norm_([qk])", r"joint_blocks.\1.x_block.\2.ln_\3"),
    (rf"transformer_blocks{NUMBER}attn\.norm_added_([qk])", r"joint_blocks.\1.context_block.attn.ln_\2"),
    (rf"transformer_blocks{NUMBER}(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
    (rf"transformer_blocks{NUMBER}attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (rf"transformer_blocks{NUMBER}norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (rf"transformer_blocks{NUMBER}norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (rf"transformer_blocks{NUMBER}ff\.net", r"joint_blocks.\1.x_block.mlp"),
    (rf"transformer_blocks{NUMBER}ff_context\.net", r"joint_blocks.\1.context_block.mlp"),
    (r"mlp\.0\.proj", "mlp.fc1"),
    (r"block\.mlp\.2", "block.mlp.fc2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
]


def original(transformer: Any, names: Names) -> dict[str, Tensor]:
    """Queries, keys and values are one matrix, and the last modulations have shift before scale."""
    pieces: dict[str, list[Tensor]] = {}
    last = f"joint_blocks.{len(transformer.transformer_blocks) - 1}.context_block.adaLN"
    parts = ("to_q", "add_q", "to_k", "add_k", "to_v", "add_v", "proj_mlp")
    state = transformer.state_dict()
    for name in sorted(state, key=lambda name: next((i for i, part in enumerate(parts) if part in name), 0)):
        renamed, value = name, state[name]
        for theirs, ours in names:
            renamed = re.sub(theirs, ours, renamed)
        if renamed.startswith(("final_layer.adaLN", last)):
            value = torch.cat(value.chunk(2)[::-1])
        pieces.setdefault(renamed, []).append(value)
    return {f"{PREFIX}{name}": torch.cat(each) if len(each) > 1 else each[0] for name, each in pieces.items()}


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_file_in_the_original_names_has_the_weights_of_its_base(kind: str, tmp_path: Path) -> None:
    """SD3, whose conversion knows no fixed sizes; other parts in the file do not matter."""
    family = tiny_flow.make_sd35_medium()
    folder, file = tiny_flow.save(family, tmp_path / "base"), tmp_path / f"original.{kind}"
    weights = original(family.transformer, SD3)
    if kind == "gguf":
        pytest.importorskip("gguf")
        write_gguf(file, weights)
    else:
        save_file({**weights, "vae.decoder.weight": torch.zeros(2)}, file)
    loaded = type(family).from_pretrained(folder, transformer_file=str(file), time_width=tiny_flow.TIME_WIDTH)

    expected, found = dict(family.transformer.named_modules()), dict(loaded.transformer.named_modules())
    for name in (name for name, module in expected.items() if getattr(module, "weight", None) is not None):
        if kind == "safetensors":
            assert torch.equal(found[name].weight, expected[name].weight), name
        else:
            stored = rounded(found[name]).float()
            torch.testing.assert_close(stored, expected[name].weight, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", [FluxTransformer2DModel, ChromaTransformer2DModel])
def test_names_of_the_published_files_are_known(kind: Any) -> None:
    """At full size, since diffusers' conversion assumes it; fp8 weights with scales of their own would be misread."""
    with torch.device("meta"):
        transformer = kind(**({"guidance_embeds": True} if kind is FluxTransformer2DModel else {}))
        names = original(transformer, FLUX)
    shapes = {name: tuple(value.shape) for name, value in names.items()}
    expected = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}

    assert in_names_of_diffusers(shapes, transformer, "flux.safetensors") == expected
    scaled = {**shapes, f"{PREFIX}double_blocks.0.img_attn.qkv.scale_weight": ()}
    with pytest.raises(UserError, match=r"base\.transformer_file=x\.safetensors has 1 tensors .*qkv\.scale_weight"):
        in_names_of_diffusers(scaled, transformer, "x.safetensors")
