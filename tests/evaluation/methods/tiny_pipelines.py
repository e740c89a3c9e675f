"""Tiny parts, made of the real classes, for the systems that diffusers has a pipeline for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_prompt_tokens as parts
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModelWithProjection

from ipa.errors import MissingWeights
from ipa.evaluation.methods.method import count_parameters


def make_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def make_unet(**options: Any) -> UNet2DConditionModel:
    """A UNet that hears its context."""
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 2, "layers_per_block": 1}
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = UNet2DConditionModel(
        **{"sample_size": 8, "cross_attention_dim": tiny.CONTEXT_WIDTH, **sizes, **kinds, **options}
    )
    for name, module in unet.named_modules():
        if name.endswith(("to_v", "to_out.0", "add_v_proj")):
            parts.loud(module)
    return unet


# the decoders of Karlo and Kandinsky, as diffusers' conversion scripts have them
UNCLIP = {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift"}


def unclip_blocks(num_attentions: int) -> dict[str, Any]:
    return {
        "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * num_attentions),
        "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * num_attentions, "ResnetUpsampleBlock2D"),
    }


def make_unclip_decoder(**options: Any) -> UNet2DConditionModel:
    return make_unet(**{**UNCLIP, **unclip_blocks(1), "attention_head_dim": 4, **options})


def make_full_unclip_decoder(**options: Any) -> UNet2DConditionModel:
    """The published sizes, without weights."""
    sizes = {"sample_size": 64, "layers_per_block": 3, "attention_head_dim": 64}
    with torch.device("meta"):
        return UNet2DConditionModel(**{**UNCLIP, **unclip_blocks(3), **sizes, **options})


def make_text_encoder(projection: int = tiny.CONTEXT_WIDTH) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(**{**tiny.make_text_encoder().config.to_dict(), "projection_dim": projection})
    return parts.loud(CLIPTextModelWithProjection(config))


def save_parts(folder: Path, **made: Any) -> Path:
    """Every part in its subfolder, as on the hub."""
    for name, part in made.items():
        part.save_pretrained(folder / name)
    return folder


def check_half_precision(method: Any) -> None:
    """Hardly another picture; the method stays in half precision."""
    prompts = parts.make_prompts()
    pixels = method.generate(prompts, parts.FAST)
    half = method.to(torch.float16).generate(prompts, parts.FAST)
    assert half.dtype == torch.float32 and (half - pixels).abs().mean() < 0.01


def check_loaded(method: nn.Module, *made: Any) -> None:
    """Every weight of the parts that the method was saved from is in it."""
    loaded = {tuple(sorted(part.state_dict())): part.state_dict() for part in method.parts}
    for part in made:
        state = part.state_dict()
        found = loaded[tuple(sorted(state))]
        assert all((weight == found[name]).all() for name, weight in state.items())


def check_incomplete(load: Any, folder: Path, model: str, weight: str, key: str = "path") -> None:
    """What lacks in a folder is named: a weight, a vocabulary, a scheduler, a whole part; and what is broken."""
    from safetensors.torch import load_file, save_file

    file = next((folder / model).glob("*.safetensors"))
    state = load_file(file)
    save_file({name: tensor for name, tensor in state.items() if name != weight}, file, {"format": "pt"})
    with pytest.raises(MissingWeights, match=rf"method\.{key}={folder} lacks 1 weights of {model}/, {weight} among"):
        load()
    file.write_bytes(b"nothing")
    with pytest.raises((MissingWeights, ValueError), match=rf"method\.{key}={folder} cannot be read in {model}/"):
        load()
    file.unlink()
    with pytest.raises(MissingWeights, match=rf"method\.{key}={folder} cannot be read in {model}/"):
        load()


def name_scheduler(folder: Path, name: str) -> None:
    file = folder / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": name}))


def in_millions(module: nn.Module) -> int:
    return round(count_parameters(module) / 1e6)
