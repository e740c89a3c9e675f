"""Names and files of the original (ldm) layout, written from diffusers' parts: the inverse of what diffusers reads."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ipa.families.latent_diffusion import LatentDiffusion
from ipa.families.sdxl import StableDiffusionXL

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "conv_in.": "input_blocks.0.0.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.": "attn.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def rename(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def unet_name(name: str, unet: UNet2DConditionModel) -> str:
    """Blocks of the original layout are numbered through; every layer, and every downsampling, is a block."""
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(ours):
            return rename(theirs + name.removeprefix(ours), RESNET if "resnets" in ours else {})
    layers = unet.config.layers_per_block
    side, level, kind, layer, rest = re.fullmatch(r"(\w+)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name).groups()
    block = int(level) * (layers + 1) + int(layer) + (side == "down")
    section = "input_blocks" if side == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{section}.{block + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        place = 2 if hasattr(unet.up_blocks[int(level)], "attentions") else 1
        return f"{section}.{block + layers}.{place}.{rest}"
    return f"{section}.{block}.1.{rest}" if kind == "attentions" else f"{section}.{block}.0.{rename(rest, RESNET)}"


def vae_name(name: str, levels: int) -> str:
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = name.replace("down_blocks.", "down.").replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = name.replace(".resnets.", ".block.").replace("samplers.0.conv", "sample.conv")
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    return rename(name, VAE_ATTENTION) if "attn_1" in name else name


def vae_to_original(vae: AutoencoderKL) -> dict[str, Tensor]:
    tensors = {}
    for name, value in vae.state_dict().items():
        original = vae_name(name, len(vae.config.block_out_channels))
        is_convolution = "attn_1" in original and value.ndim == 2
        tensors[f"first_stage_model.{original}"] = value[:, :, None, None] if is_convolution else value
    return tensors


def clip_to_original(encoder: Any, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.transformer.text_model.{name}": value for name, value in encoder.state_dict().items()}


def open_clip_to_original(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """open_clip keeps the three projections in one tensor, and multiplies by the text projection from the right."""
    tensors = {}
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    for name, value in state.items():
        if name == "text_projection.weight":
            tensors["text_projection"] = value.T
        elif "q_proj" in name:
            joined = torch.cat([state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            tensors[rename(name.replace("q_proj.", "in_proj_"), OPEN_CLIP)] = joined
        elif "k_proj" not in name and "v_proj" not in name:
            tensors[rename(name, OPEN_CLIP)] = value
    return {f"{prefix}.model.{name}": value for name, value in tensors.items()}


def text_to_original(family: LatentDiffusion) -> dict[str, Tensor]:
    if isinstance(family, StableDiffusionXL):
        first = clip_to_original(family.text_encoder, "conditioner.embedders.0")
        return first | open_clip_to_original(family.text_encoder_2, "conditioner.embedders.1")
    if family.text_encoder.config.hidden_act == "gelu":
        return open_clip_to_original(family.text_encoder, "cond_stage_model")
    return clip_to_original(family.text_encoder, "cond_stage_model")


def unet_to_original(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    return {f"model.diffusion_model.{unet_name(name, unet)}": value for name, value in unet.state_dict().items()}


def to_original(family: LatentDiffusion) -> dict[str, Tensor]:
    tensors = unet_to_original(family.unet) | vae_to_original(family.vae) | text_to_original(family)
    return {name: value.contiguous() for name, value in tensors.items()}


def write_header(path: Path, shapes: Iterable[tuple[str, Iterable[int]]]) -> str:
    """A file of fp16 tensors with a true header and a hole for data: to read it all would take a while, or memory."""
    header, end = {}, 0
    for name, shape in shapes:
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return str(path)
