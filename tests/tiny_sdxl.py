"""Tiny parts of Stable Diffusion XL and 2.1, made of the real classes like those in ``tiny.py``.

The widths all differ again: text 8 and 20, context 28, pooled text 18, six sizes of 4 numbers each.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import tiny
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ipa.families.sdxl import StableDiffusionXL
from ipa.families.stable_diffusion import StableDiffusion

TEXT_WIDTHS = (8, 20)
CONTEXT_WIDTH = sum(TEXT_WIDTHS)
POOLED_WIDTH = 18
SIZE_WIDTH = 4
make_text_config = partial(tiny.make_text_config, projection_dim=POOLED_WIDTH)
# down 16 × 4, 32 × 6 | up 32 × 9, 16 × 6 | mid 32 × 3
HIDDEN = [16] * 4 + [32] * 6 + [32] * 9 + [16] * 6 + [32] * 3
# as the published SDXL has it
SCHEDULE = {**tiny.SCHEDULE, "timestep_spacing": "leading", "steps_offset": 1}


def make_unet(**changes: Any) -> UNet2DConditionModel:
    config = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": CONTEXT_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * SIZE_WIDTH,
    }
    return tiny.make_unet(**{**config, **changes})


def make_family(prediction_type: str = "epsilon", zero_snr: bool = False, seed: int = 0) -> StableDiffusionXL:
    torch.manual_seed(seed)
    second = tiny.make_tokenizer()
    second.pad_token = second.bos_token  # the published tokenizers pad differently too
    family = StableDiffusionXL(
        vae=tiny.make_vae(),
        text_encoder=CLIPTextModel(make_text_config(TEXT_WIDTHS[0], 2, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(make_text_config(TEXT_WIDTHS[1], 3, "gelu")),
        tokenizer=tiny.make_tokenizer(),
        tokenizer_2=second,
        unet=make_unet(),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr),
        source="tiny",
    )
    tiny.make_loud(family)
    tiny.lay_out(family)
    return family


def make_family_2_1() -> StableDiffusion:
    """2.1's ways: v-prediction, linear projections, more heads at deeper levels, a text encoder from open_clip."""
    torch.manual_seed(0)
    heads = {"attention_head_dim": (1, 2, 4), "use_linear_projection": True}
    unet = tiny.make_unet(**heads, cross_attention_dim=TEXT_WIDTHS[1])
    family = StableDiffusion(
        vae=tiny.make_vae(),
        text_encoder=CLIPTextModel(make_text_config(TEXT_WIDTHS[1], 3, "gelu")),
        tokenizer=tiny.make_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"),
        source="tiny",
    )
    tiny.make_loud(family)
    tiny.lay_out(family)
    return family


FAMILIES = {"sd15": tiny.make_family, "sd21": make_family_2_1, "sdxl": make_family}
