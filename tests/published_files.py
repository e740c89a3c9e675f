"""The seven published files for UNets as numbers: names and shapes, by hand and without memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CONTEXT = {"sd15": 768, "sdxl": 2048}
# down | up | mid last: numbers 1, 3, 5 …
HIDDEN = {
    "sd15": [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280],
    "sdxl": [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10,
}
# E, F, P
ENCODERS = {"ViT-H": (1024, 1280, 257), "ViT-bigG": (1280, 1664, 257)}


@dataclass(frozen=True)
class PublishedFile:
    """Numbers are as published, not counted from the shapes."""

    kind: str
    base: str
    encoder: str
    num_tokens: int
    shapes: Shapes
    num_tensors: int
    num_parameters: int


def global_head(features: int, context: int) -> Shapes:
    norm: Shapes = {"norm.weight": (context,), "norm.bias": (context,)}
    return {"proj.weight": (4 * context, features), "proj.bias": (4 * context,), **norm}


def full_head(features: int, context: int) -> Shapes:
    first: Shapes = {"proj.0.weight": (features, features), "proj.0.bias": (features,)}
    second: Shapes = {"proj.2.weight": (context, features), "proj.2.bias": (context,)}
    return first | second | {"proj.3.weight": (context,), "proj.3.bias": (context,)}


def resampler(width: int, inner: int, context: int) -> Shapes:
    """Four layers and 16 queries of ``width`` over ViT-H's patches, with attention ``inner`` wide."""
    ends: Shapes = {"latents": (1, 16, width), "proj_in.weight": (width, 1280), "proj_in.bias": (width,)}
    ends |= {"proj_out.weight": (context, width), "proj_out.bias": (context,)}
    ends |= {"norm_out.weight": (context,), "norm_out.bias": (context,)}
    norms = ("0.norm1", "0.norm2", "1.0")
    layer: Shapes = {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    layer |= {"0.to_q.weight": (inner, width), "0.to_kv.weight": (2 * inner, width), "0.to_out.weight": (width, inner)}
    layer |= {"1.1.weight": (4 * width, width), "1.3.weight": (width, 4 * width)}
    return ends | {f"layers.{number}.{name}": shape for number in range(4) for name, shape in layer.items()}


def named(head: Shapes) -> Shapes:
    """A head's shapes under their names in the file."""
    return {f"image_proj.{name}": shape for name, shape in head.items()}


def branches(hidden: list[int], context: int) -> Shapes:
    return {
        f"ip_adapter.{number}.to_{which}_ip.weight": (width, context)
        for number, width in zip(range(1, 2 * len(hidden), 2), hidden, strict=True)
        for which in "kv"
    }


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


SD15, SDXL = (branches(HIDDEN[base], CONTEXT[base]) for base in ("sd15", "sdxl"))
PUBLISHED = {
    "ip-adapter_sd15": PublishedFile(
        "global", "sd15", "ViT-H", 4, named(global_head(1024, 768)) | SD15, 36, 22_319_616
    ),
    "ip-adapter_sd15_vit-G": PublishedFile(
        "global", "sd15", "ViT-bigG", 4, named(global_head(1280, 768)) | SD15, 36, 23_106_048
    ),
    "ip-adapter-full-face_sd15": PublishedFile(
        "full", "sd15", "ViT-H", 257, named(full_head(1280, 768)) | SD15, 38, 21_794_304
    ),
    "ip-adapter-plus_sd15": PublishedFile(
        "fine_grained", "sd15", "ViT-H", 16, named(resampler(768, 768, 768)) | SD15, 83, 49_087_488
    ),
    "ip-adapter_sdxl": PublishedFile(
        "global", "sdxl", "ViT-bigG", 4, named(global_head(1280, 2048)) | SDXL, 144, 351_285_248
    ),
    "ip-adapter_sdxl_vit-h": PublishedFile(
        "global", "sdxl", "ViT-H", 4, named(global_head(1024, 2048)) | SDXL, 144, 349_188_096
    ),
    "ip-adapter-plus_sdxl_vit-h": PublishedFile(
        "fine_grained", "sdxl", "ViT-H", 16, named(resampler(1280, 1280, 2048)) | SDXL, 191, 423_748_864
    ),
}
