"""The public bases that the recipes name, as their configurations describe them, without weights (see `hollow`)."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKL,
    ChromaTransformer2DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (  # type: ignore[attr-defined] # transformers 5 has T5TokenizerFast as an alias
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

Parts = dict[str, Any]
CLIP_L: Parts = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
CLIP_H: Parts = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_BIGG: Parts = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
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


def sd15() -> Parts:
    text = CLIPTextModel(CLIPTextConfig(**CLIP_L))
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return {"text_encoder": text, "unet": unet, **with_unet(0.18215, 512)}


def sd21() -> Parts:
    text = CLIPTextModel(CLIPTextConfig(**CLIP_H, hidden_act="gelu"))
    unet = UNet2DConditionModel(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
    )
    return {"text_encoder": text, "unet": unet, **with_unet(0.18215, 768, "v_prediction")}


def sdxl() -> Parts:
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
    return {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIGG)),
        "tokenizer_2": make_tokenizer(),
        "unet": unet,
        **with_unet(0.13025, 1024),
    }


def flux(guidance: bool = True) -> Parts:
    """FLUX.1-dev; without embedded ``guidance``, schnell."""
    return {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        "tokenizer": make_tokenizer(),
        **t5("text_encoder_2", "tokenizer_2", 512 if guidance else 256),
        "transformer": FluxTransformer2DModel(guidance_embeds=guidance),
        **with_flow(0.3611, 0.1159, **(FLUX_SCHEDULE if guidance else {"shift": 1.0})),
    }


def chroma() -> Parts:
    return {
        **t5("text_encoder", "tokenizer", 512),
        "transformer": ChromaTransformer2DModel(),
        **with_flow(0.3611, 0.1159, **FLUX_SCHEDULE),
    }


def sd3(**sizes: Any) -> Parts:
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**each)) for each in (CLIP_L, CLIP_BIGG)]
    return {
        "text_encoder": encoders[0],
        "text_encoder_2": encoders[1],
        "tokenizer": make_tokenizer(),
        "tokenizer_2": make_tokenizer(),
        **t5("text_encoder_3", "tokenizer_3", 512),
        "transformer": SD3Transformer2DModel(sample_size=128, **sizes),
        **with_flow(1.5305, 0.0609, shift=3.0),
    }


PUBLISHED: dict[str, Callable[[], Parts]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": sd15,
    "stabilityai/stable-diffusion-2-1": sd21,
    "stabilityai/stable-diffusion-xl-base-1.0": sdxl,
    "black-forest-labs/FLUX.1-dev": flux,
    "black-forest-labs/FLUX.1-schnell": partial(flux, guidance=False),
    "lodestones/Chroma1-HD": chroma,
    "stabilityai/stable-diffusion-3-medium-diffusers": partial(sd3, **MEDIUM),
    "stabilityai/stable-diffusion-3.5-medium": partial(sd3, **MEDIUM | DUAL),
    "stabilityai/stable-diffusion-3.5-large": partial(sd3, **LARGE | NORMED),
}


def with_unet(scaling_factor: float, size_px: int, prediction_type: str = "epsilon") -> Parts:
    """First tokenizer, VAE and schedule of a base with a UNet."""
    vae = make_vae(sample_size=size_px, scaling_factor=scaling_factor)
    schedule = DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1, prediction_type=prediction_type)
    return {"vae": vae, "tokenizer": make_tokenizer(), "scheduler": schedule}


def with_flow(scaling_factor: float, shift_factor: float, **schedule: Any) -> Parts:
    """VAE and schedule of a base with rectified flow."""
    scaling: Parts = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    no_convolutions: Parts = {"use_quant_conv": False, "use_post_quant_conv": False}
    vae = make_vae(latent_channels=16, sample_size=1024, **scaling, **no_convolutions)
    return {"vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(**schedule)}


def make_vae(**changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **changes,
    )


def t5(encoder: str, tokenizer: str, length: int) -> Parts:
    """T5-XXL 1.1's encoder, and letters as tokens."""
    config = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    pieces = [(piece, -1.0) for piece in ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]]
    return {
        encoder: T5EncoderModel(config),
        tokenizer: T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length),
    }


def make_tokenizer() -> CLIPTokenizer:
    """Letters as tokens: memory depends on a text's length, not on its content."""
    pieces = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
