"""Base models without weights: their modules as configuration describes them, on whatever device torch makes them.

    with torch.device("meta"):
        family = make_hollow(StableDiffusion, "demo/base")

What a base weighs, and how much memory a step takes, are known from this before anything is downloaded. The public
bases that the recipes name are described here, so that the hub is not needed for them.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ipa.errors import MissingWeights
from ipa.families import hollow_transformers
from ipa.families.sources import is_single_file, parts_in, read_config, read_index
from ipa.families.stored import BITS, store
from ipa.families.transformer_file import check_exists, is_gguf
from ipa.weights import read_dtype

Parts = dict[str, Any]
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def make_hollow(
    family: Any,
    path: str,
    config: str | None = None,
    dtype: str = "float32",
    vae_dtype: str | None = None,
    channels_last: bool = False,
    quantization: str | None = None,
    text_quantization: str | None = None,
    transformer_file: str | None = None,
    **options: Any,
) -> Any:
    """A base of this class with random or no weights, as ``from_pretrained`` with these arguments would load it.

    It is not quantized: see ``quantize_hollow``. Raises MissingWeights if neither a folder, the hub or its cache, nor
    this module describes it.
    """
    layout = (config or path) if is_single_file(path) else path
    left_out = family.left_out(**options)
    made = family(**{**make_parts(family, layout), **left_out}, source=path, **options)
    made.to(read_dtype(dtype, "base.dtype"))
    if vae_dtype:
        nn.Module.to(made.vae, read_dtype(vae_dtype, "base.vae_dtype"))
    if channels_last:
        for part in (made.denoiser, made.vae):
            part.to(memory_format=torch.channels_last)
    return made


def make_parts(family: Any, layout: str) -> Parts:
    if layout in PUBLISHED and not Path(layout).exists():
        return PUBLISHED[layout]()
    index = read_index(layout, "base.path")
    return {name: make_part(layout, name, *index[name]) for name in parts_in(index) if name not in family.absent}


def quantize_hollow(
    family: Any,
    quantization: str | None = None,
    text_quantization: str | None = None,
    transformer_file: str | None = None,
    **options: Any,
) -> None:
    """Let layers take the memory that they have when quantized; raises MissingWeights for a file that is not there."""
    for name, scheme in family.quantized_parts(quantization, text_quantization).items():
        if scheme and (part := getattr(family, name)) is not None:
            store(part, BITS[scheme], remade=scheme == "nf4", kept=family.kept)
    if transformer_file and is_gguf(transformer_file):
        check_exists(transformer_file)
        weights = sum(parameter.numel() for parameter in family.denoiser.parameters())
        store(family.denoiser, 8 * Path(transformer_file).stat().st_size / weights)


def make_part(layout: str, name: str, library: str, kind: str) -> Any:
    """A part of a pipeline from its configuration; tokenizers and schedulers whole."""
    if "tokenizer" in name:
        with torch.device("cpu"):
            return read_transformers(getattr(transformers, kind), layout, name)
    if library == "transformers":
        model = getattr(transformers, kind)
        return model(read_transformers(model.config_class, layout, name)).eval()
    part = getattr(diffusers, kind)
    return part.from_config(read_config(part, layout, "base.path", subfolder=name))


def read_transformers(kind: Any, layout: str, name: str) -> Any:
    try:
        return kind.from_pretrained(layout, subfolder=name)
    except OSError as error:
        raise MissingWeights(f"base.path={layout} has no readable {name}") from error


def sd15() -> Parts:
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return {"text_encoder": CLIPTextModel(text), "unet": unet, **common(0.18215, 512)}


def sd21() -> Parts:
    text = CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
    )
    unet = UNet2DConditionModel(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
    )
    return {"text_encoder": CLIPTextModel(text), "unet": unet, **common(0.18215, 768, "v_prediction")}


def sdxl() -> Parts:
    first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    second = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    )
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    text = {"text_encoder": CLIPTextModel(first), "text_encoder_2": CLIPTextModelWithProjection(second)}
    return {**text, "tokenizer_2": make_tokenizer(), "unet": unet, **common(0.13025, 1024)}


def with_tokenizer(make: Callable[[Any], Parts]) -> Parts:
    return make(make_tokenizer())


PUBLISHED: dict[str, Callable[[], Parts]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": sd15,
    "stabilityai/stable-diffusion-2-1": sd21,
    "stabilityai/stable-diffusion-xl-base-1.0": sdxl,
    **{path: partial(with_tokenizer, make) for path, make in hollow_transformers.PUBLISHED.items()},
}


def common(scaling_factor: float, size_px: int, prediction_type: str = "epsilon") -> Parts:
    """VAE, first tokenizer and schedule, which the public bases share but for these numbers."""
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=size_px,
        scaling_factor=scaling_factor,
    )
    schedule = DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1, prediction_type=prediction_type)
    return {"vae": vae, "tokenizer": make_tokenizer(), "scheduler": schedule}


def make_tokenizer() -> CLIPTokenizer:
    """Letters as tokens; what a text says costs nothing, how long it may be does."""
    pieces = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
