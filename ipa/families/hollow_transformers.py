"""The published FLUX.1, Chroma and Stable Diffusion 3, as their configurations describe them, without weights."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKL,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from transformers import (  # type: ignore[attr-defined] # transformers 5 has T5TokenizerFast as an alias
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

Parts = dict[str, Any]
CLIP_L: Parts = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
CLIP_BIGG: Parts = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
FLUX_SCHEDULE: Parts = {"shift": 3.0, "use_dynamic_shifting": True}
SD3: Parts = {
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "attention_head_dim": 64,
    "pos_embed_max_size": 192,
}
MEDIUM: Parts = {**SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
LARGE: Parts = {**SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
NORMED: Parts = {"qk_norm": "rms_norm"}
DUAL: Parts = {**NORMED, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}


def flux(clip_tokenizer: Any, guidance: bool = True) -> Parts:
    """FLUX.1-dev, and with no embedded ``guidance`` schnell."""
    return {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        "tokenizer": clip_tokenizer,
        **t5("text_encoder_2", "tokenizer_2", 512 if guidance else 256),
        "transformer": FluxTransformer2DModel(guidance_embeds=guidance),
        **common(0.3611, 0.1159, **(FLUX_SCHEDULE if guidance else {"shift": 1.0})),
    }


def chroma(clip_tokenizer: Any) -> Parts:
    return {
        **t5("text_encoder", "tokenizer", 512),
        "transformer": ChromaTransformer2DModel(),
        **common(0.3611, 0.1159, **FLUX_SCHEDULE),
    }


def sd3(clip_tokenizer: Any, **sizes: Any) -> Parts:
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**each)) for each in (CLIP_L, CLIP_BIGG)]
    return {
        "text_encoder": encoders[0],
        "text_encoder_2": encoders[1],
        "tokenizer": clip_tokenizer,
        "tokenizer_2": clip_tokenizer,
        **t5("text_encoder_3", "tokenizer_3", 512),
        "transformer": SD3Transformer2DModel(sample_size=128, **sizes),
        **common(1.5305, 0.0609, shift=3.0),
    }


PUBLISHED: dict[str, Callable[[Any], Parts]] = {
    "black-forest-labs/FLUX.1-dev": flux,
    "black-forest-labs/FLUX.1-schnell": lambda tokenizer: flux(tokenizer, guidance=False),
    "lodestones/Chroma1-HD": chroma,
    "stabilityai/stable-diffusion-3-medium-diffusers": lambda tokenizer: sd3(tokenizer, **MEDIUM),
    "stabilityai/stable-diffusion-3.5-medium": lambda tokenizer: sd3(tokenizer, **MEDIUM | DUAL),
    "stabilityai/stable-diffusion-3.5-large": lambda tokenizer: sd3(tokenizer, **LARGE | NORMED),
}


def t5(encoder: str, tokenizer: str, length: int) -> Parts:
    """T5-XXL 1.1's encoder, and letters as tokens."""
    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    pieces = [(piece, -1.0) for piece in ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]]
    return {
        encoder: T5EncoderModel(config),
        tokenizer: T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length),
    }


def common(scaling_factor: float, shift_factor: float, **schedule: Any) -> Parts:
    """VAE of 16 channels, and schedule."""
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=1024,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )
    return {"vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(**schedule)}
