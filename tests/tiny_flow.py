"""Tiny FLUX, Chroma and Stable Diffusion 3 made of the real classes, on the latents of ``tiny.py``: 4 × 8 × 8 at 16 px.

The widths all differ: T5 20 (FLUX) and 32, CLIP 16, transformer 32 with heads of 16.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import tiny
import tiny_sdxl
import torch
from diffusers import (
    AutoencoderKL,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from ipa.adapter.heads import GlobalHead, MLPHead
from ipa.adapter.kinds import DecoupledAdapter
from ipa.adapter.time_resampler import TimeResamplerHead
from ipa.families.chroma import Chroma
from ipa.families.flux import Flux
from ipa.families.sd3 import StableDiffusion3
from ipa.model import IPAdapterModel

T5_WIDTH = 20
T5_LENGTH = 12
SD3_T5_WIDTH = 36
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": T5_WIDTH,
    "axes_dims_rope": (4, 4, 8),
}
CHROMA = {"approximator_hidden_dim": 24, "approximator_layers": 1, "approximator_num_channels": 16}
# as the published ones have them
FLUX_SCHEDULE = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}


def make_t5_tokenizer() -> T5TokenizerFast:
    """Letters as tokens."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    return T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=T5_LENGTH)


def make_t5(width: int = T5_WIDTH) -> T5EncoderModel:
    config = T5Config(
        vocab_size=30, d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def make_vae() -> AutoencoderKL:
    no_convolutions = {"use_quant_conv": False, "use_post_quant_conv": False}
    return tiny.make_vae(shift_factor=0.1, scaling_factor=0.4, **no_convolutions)


def loud(model: nn.Module) -> Any:
    """Networks fresh from initialisation hardly hear their conditions, and some of their weights are zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def make_flux(guidance: bool = True, seed: int = 0, **options: Any) -> Flux:
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(**FLUX, pooled_projection_dim=tiny.CONTEXT_WIDTH, guidance_embeds=guidance)
    schedule = FLUX_SCHEDULE if guidance else {"shift": 1.0}
    return Flux(
        vae=make_vae(),
        text_encoder=tiny.make_text_encoder(),
        tokenizer=tiny.make_tokenizer(),
        text_encoder_2=make_t5(),
        tokenizer_2=make_t5_tokenizer(),
        transformer=loud(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
        **{"source": "tiny", **options},
    )


def make_schnell(seed: int = 0, **options: Any) -> Flux:
    return make_flux(guidance=False, seed=seed, **options)


def make_chroma(seed: int = 0, **options: Any) -> Chroma:
    torch.manual_seed(seed)
    return Chroma(
        vae=make_vae(),
        text_encoder=make_t5(),
        tokenizer=make_t5_tokenizer(),
        transformer=loud(ChromaTransformer2DModel(**FLUX, **CHROMA)),
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULE),
        **{"source": "tiny", **options},
    )


def save(family: Any, folder: Path) -> str:
    """The family as a diffusers folder."""
    family.pipeline().save_pretrained(folder)
    return str(folder)


SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": SD3_T5_WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 2 * tiny_sdxl.POOLED_WIDTH,
    "pos_embed_max_size": 8,
}
SD35_MEDIUM = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
TIME_WIDTH = 64


def make_sd3(seed: int = 0, t5: bool = True, config: dict[str, Any] | None = None, **options: Any) -> StableDiffusion3:
    torch.manual_seed(seed)
    widths = zip(tiny_sdxl.TEXT_WIDTHS, ("quick_gelu", "gelu"), strict=True)
    clips = [CLIPTextModelWithProjection(tiny_sdxl.make_text_config(width, 2, act)) for width, act in widths]
    t5_parts = {"text_encoder_3": make_t5(SD3_T5_WIDTH), "tokenizer_3": make_t5_tokenizer()}
    return StableDiffusion3(
        vae=make_vae(),
        text_encoder=clips[0],
        text_encoder_2=clips[1],
        tokenizer=tiny.make_tokenizer(),
        tokenizer_2=tiny.make_tokenizer(),
        **(t5_parts if t5 else dict.fromkeys(t5_parts)),
        transformer=loud(SD3Transformer2DModel(**SD3, **(config or {}))),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **{"source": "tiny", "time_width": TIME_WIDTH, "t5": t5, **options},
    )


def make_sd35_medium(seed: int = 0, **options: Any) -> StableDiffusion3:
    return make_sd3(seed, config=SD35_MEDIUM, **options)


def make_time_head(family: Any, encoder: Any) -> TimeResamplerHead:
    sizes = {"num_tokens": 5, "width": TIME_WIDTH, "heads": 1, "time_channels": 16}
    return TimeResamplerHead.fitting(encoder.widths, family.context_width, **sizes)


def make_model(make: Any, **options: Any) -> IPAdapterModel:
    """A model of the family with the head that its published adapters have, not installed."""
    family, encoder = make(**options), tiny.make_encoder()
    if family.branches == "sd3":
        head: Any = make_time_head(family, encoder)
    elif family.branches == "instantx":
        head = MLPHead.fitting(encoder.widths, family.context_width, num_tokens=6)
    else:
        head = GlobalHead.fitting(encoder.widths, family.context_width, no_image="black")
    return IPAdapterModel(family, encoder, head, DecoupledAdapter(family.hosts()))


MAKERS = {
    "flux": make_flux,
    "schnell": make_schnell,
    "chroma": make_chroma,
    "sd3": make_sd3,
    "sd35_medium": make_sd35_medium,
}
