"""Reads from configuration or header what a base with a UNet is: its conditions, hosts and image size."""

from __future__ import annotations

import re

from diffusers import UNet2DConditionModel

from ipa.families.cross_attention import find_hosts
from ipa.families.sources import (
    Shapes,
    is_single_file,
    make_without_weights,
    read_cell_px,
    read_header,
    read_index,
    read_part,
)
from ipa.types import BaseWidths

UNET = "model.diffusion_model."
# the published order, which is also that of find_hosts
SECTIONS = {"input_blocks": 0, "output_blocks": 1, "middle_block": 2}
HOST_KEY = re.compile(rf"{re.escape(UNET)}(\w+)\.(.+)\.attn2\.to_k\.weight")
TEXT_ALONE, TEXT_AND_SIZES = "text", "text_time"  # what conditions a UNet besides the time


def read_conditions(path: str, key: str = "base.path") -> str | None:
    """``TEXT_ALONE``, ``TEXT_AND_SIZES``, or None for a base that is not made for text to image.

    Raises UserError if there is nothing to read.
    """
    return conditions_of_header(read_header(path, key)) if is_single_file(path) else conditions_of_folder(path, key)


def conditions_of_header(shapes: Shapes) -> str | None:
    """For a file in the original layout."""
    conv_in, conv_out = shapes.get(f"{UNET}input_blocks.0.0.weight"), shapes.get(f"{UNET}out.2.weight")
    if conv_in is None or conv_out is None or not any(HOST_KEY.fullmatch(name) for name in shapes):
        return None
    if conv_in[1] != conv_out[0]:  # inpainting and the like read more than latents
        return None
    if any(name.startswith("conditioner.embedders.1.") for name in shapes):
        return TEXT_AND_SIZES
    # SDXL's refiner and unCLIP have an added embedding as well, but for other conditions
    return None if f"{UNET}label_emb.0.0.weight" in shapes else TEXT_ALONE


def conditions_of_folder(path: str, key: str) -> str | None:
    """For a diffusers folder or hub id."""
    index = read_index(path, key)
    if "unet" not in index or index.get("text_encoder", [None])[0] is None:  # the refiner only has its second one
        return None
    config = read_part(UNet2DConditionModel, path, "unet", key)
    if config.get("in_channels", 4) != config.get("out_channels", 4) or config.get("class_embed_type"):
        return None
    return {None: TEXT_ALONE, "text_time": TEXT_AND_SIZES}.get(config.get("addition_embed_type"))


def read_host_widths(path: str) -> BaseWidths:
    """Context width, and the inner width of every host in order; no weight is read."""
    if is_single_file(path):
        return host_widths_of_header(read_header(path))
    unet = make_without_weights(UNet2DConditionModel, path, "unet")
    context = unet.config.cross_attention_dim
    return BaseWidths(context, [host.width for host in find_hosts(unet)], context, "unet")


def host_widths_of_header(shapes: Shapes) -> BaseWidths:
    """The same for a file in the original layout, in which the names alone give the order."""
    found = []
    for name, shape in shapes.items():
        if match := HOST_KEY.fullmatch(name):
            position = [int(number) for number in re.findall(r"\d+", match[2])]
            found.append((SECTIONS[match[1]], position, shape))
    found.sort()
    context = found[0][2][1]
    return BaseWidths(context, [shape[0] for _, _, shape in found], context, "unet")


def read_image_size(path: str) -> int:
    """Edge in pixels of the images that a pipeline's UNet was trained for."""
    return read_part(UNet2DConditionModel, path, "unet")["sample_size"] * read_cell_px(path)
