"""Tiny parts, made of the real classes, of the systems that diffusers has a pipeline for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import tiny_prompt_tokens as parts
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    KandinskyPipeline,
    KandinskyPriorPipeline,
    PNDMScheduler,
    PriorTransformer,
    StableDiffusionImageVariationPipeline,
    StableUnCLIPImg2ImgPipeline,
    UnCLIPImageVariationPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VersatileDiffusionImageVariationPipeline,
    VQModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import nn
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModelWithProjection, XLMRobertaTokenizer

from ipa.evaluation.methods.kandinsky import Kandinsky21
from ipa.evaluation.methods.karlo import OpenUnCLIP
from ipa.evaluation.methods.pipelines import read_classes
from ipa.evaluation.methods.sd_unclip import SDUnCLIP
from ipa.evaluation.methods.sd_variations import SDImageVariations
from ipa.evaluation.methods.versatile import DualGuidedPipeline, Versatile, VersatileDual

WIDTH = tiny.CONTEXT_WIDTH  # of the text states, and of most embeddings
UNCLIP_WIDTH = 12
TEXT_WIDTH = 20
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "▁", *tiny.VOCABULARY[:26], "<mask>"]
Parts = dict[str, Any]


def make_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def loud_attention(unet: Any) -> Any:
    """A UNet that hears its context."""
    for name, module in unet.named_modules():
        if name.endswith(("to_v", "to_out.0", "add_v_proj")):
            parts.loud(module)
    return unet


def make_unet(**options: Any) -> UNet2DConditionModel:
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 2, "layers_per_block": 1}
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    defaults = {"sample_size": 8, "cross_attention_dim": WIDTH, **sizes, **kinds}
    return loud_attention(UNet2DConditionModel(**{**defaults, **options}))


# the decoders of Karlo and Kandinsky, as diffusers' conversion scripts have them
UNCLIP = {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift"}
KARLO = {"class_embed_type": "identity", "in_channels": 3, "out_channels": 6}
KANDINSKY = {
    "addition_embed_type": "text_image",
    "encoder_hid_dim_type": "text_image_proj",
    "in_channels": 4,
    "out_channels": 8,
}
KarloProjection = read_classes(UnCLIPImageVariationPipeline)["text_proj"]


def unclip_blocks(num_attentions: int) -> Parts:
    return {
        "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * num_attentions),
        "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * num_attentions, "ResnetUpsampleBlock2D"),
    }


def make_unclip_decoder(**options: Any) -> UNet2DConditionModel:
    return make_unet(**{**UNCLIP, **unclip_blocks(1), "attention_head_dim": 4, **options})


def make_text_encoder() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(**{**tiny.make_text_encoder().config.to_dict(), "projection_dim": WIDTH})
    return parts.loud(CLIPTextModelWithProjection(config))


def unclip_parts() -> Parts:
    class_embedding = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * UNCLIP_WIDTH}
    return {
        "feature_extractor": make_processor(),
        "image_encoder": parts.loud(parts.make_vision(UNCLIP_WIDTH)),
        "image_normalizer": StableUnCLIPImageNormalizer(UNCLIP_WIDTH),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "tokenizer": tiny.make_tokenizer(),
        "text_encoder": tiny.make_text_encoder(),
        "unet": make_unet(**class_embedding),
        "scheduler": PNDMScheduler(
            **tiny.SCHEDULE, prediction_type="v_prediction", skip_prk_steps=True, set_alpha_to_one=False
        ),
        "vae": tiny.make_vae(),
    }


def variation_parts() -> Parts:
    return {
        "vae": tiny.make_vae(),
        "image_encoder": parts.loud(parts.make_vision()),
        "unet": make_unet(),
        "scheduler": PNDMScheduler(**tiny.SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        "feature_extractor": make_processor(),
    }


def make_super_res() -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        add_attention=False,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )


def karlo_parts() -> Parts:
    projection = KarloProjection(clip_embeddings_dim=WIDTH, time_embed_dim=4 * 8, cross_attention_dim=TEXT_WIDTH)
    return {
        "decoder": make_unclip_decoder(**KARLO, cross_attention_dim=TEXT_WIDTH),
        "text_encoder": make_text_encoder(),
        "tokenizer": tiny.make_tokenizer(),
        "text_proj": parts.loud(projection),
        "feature_extractor": make_processor(),
        "image_encoder": parts.loud(parts.make_vision(WIDTH)),
        "super_res_first": make_super_res(),
        "super_res_last": make_super_res(),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log"),
    }


def versatile_vision() -> Any:
    """257 tokens, as diffusers has it written."""
    return parts.loud(parts.make_vision(num_hidden_layers=1, patch_size=1))


def text_flow() -> nn.Module:
    return read_classes(DualGuidedPipeline)["text_unet"](
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockFlat", "DownBlockFlat"),
        up_block_types=("UpBlockFlat", "CrossAttnUpBlockFlat"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def versatile_parts() -> Parts:
    """All of the published folder."""
    return {
        "tokenizer": tiny.make_tokenizer(),
        "image_feature_extractor": make_processor(),
        "text_encoder": make_text_encoder(),
        "image_encoder": versatile_vision(),
        "image_unet": make_unet(),
        "text_unet": loud_attention(text_flow()),
        "vae": tiny.make_vae(),
        "scheduler": DDIMScheduler(**tiny.SCHEDULE),
    }


def prior_parts() -> Parts:
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        embedding_dim=WIDTH,
        num_embeddings=tiny.TEXT_LENGTH,
        additional_embeddings=4,
    )
    return {
        "prior": parts.loud(prior),
        "image_encoder": parts.loud(parts.make_vision(WIDTH)),
        "text_encoder": make_text_encoder(),
        "tokenizer": tiny.make_tokenizer(),
        "scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
        "image_processor": make_processor(),
    }


def kandinsky_text_encoder() -> nn.Module:
    encoder_class = read_classes(KandinskyPipeline)["text_encoder"]
    config = encoder_class.config_class(
        transformerDimSize=TEXT_WIDTH,
        imageDimSize=WIDTH,
        hidden_size=TEXT_WIDTH,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(WORDS),
        max_position_embeddings=80,
        pad_token_id=1,
    )
    return parts.loud(encoder_class(config))


def kandinsky_parts() -> Parts:
    movq = VQModel(
        block_out_channels=(32, 32),  # its normalisation has 32 groups
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=8,
        norm_num_groups=4,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    return {
        "text_encoder": kandinsky_text_encoder(),
        "tokenizer": XLMRobertaTokenizer(vocab=[(word, 0.0) for word in WORDS], model_max_length=77),
        "unet": make_unclip_decoder(**KANDINSKY, encoder_hid_dim=TEXT_WIDTH, addition_embed_type_num_heads=2),
        "scheduler": DDPMScheduler(beta_start=0.00085, beta_end=0.012),
        "movq": movq,
    }


@dataclass(frozen=True)
class System:
    """A method, its published folders (each with its option, pipeline and parts), and options for tiny ones."""

    method: Any
    folders: dict[str, tuple[Any, Callable[[], Parts]]]
    options: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, Any] = field(default_factory=dict)

    def make_parts(self) -> dict[str, Parts]:
        return {option: make() for option, (_, make) in self.folders.items()}

    def make(self, made: dict[str, Parts] | None = None, **others: Any) -> Any:
        """The method of these parts; ``others`` replace parts of the last folder, or options."""
        made = made or self.make_parts()
        replaced = {name: others.pop(name) for name in list(others) if name in [*made.values()][-1]}
        pipelines = []
        for option, (pipeline, _) in self.folders.items():
            needed = read_classes(pipeline)
            own = {name: part for name, part in {**made[option], **replaced}.items() if name in needed}
            pipelines.append(pipeline(**own, **self.absent))
        return self.method(*pipelines, **{**self.options, **others})


NO_CHECKER = {"safety_checker": None, "requires_safety_checker": False}
SYSTEMS = {
    "sd_unclip": System(SDUnCLIP, {"path": (StableUnCLIPImg2ImgPipeline, unclip_parts)}, {"noise_level": 500}),
    "sd_image_variations": System(
        SDImageVariations, {"path": (StableDiffusionImageVariationPipeline, variation_parts)}, absent=NO_CHECKER
    ),
    "open_unclip": System(OpenUnCLIP, {"path": (UnCLIPImageVariationPipeline, karlo_parts)}, {"super_res_steps": 2}),
    "kandinsky21": System(
        Kandinsky21,
        {"prior_path": (KandinskyPriorPipeline, prior_parts), "path": (KandinskyPipeline, kandinsky_parts)},
        {"prior_steps": 2},
    ),
    "versatile": System(Versatile, {"path": (VersatileDiffusionImageVariationPipeline, versatile_parts)}),
    "versatile_dual": System(VersatileDual, {"path": (DualGuidedPipeline, versatile_parts)}, {"text_weight": 0.3}),
}


def save_parts(folder: Path, made: Parts) -> Path:
    """Every part in its subfolder, as on the hub."""
    for name, part in made.items():
        part.save_pretrained(folder / name)
    return folder


def full_size(kind: Any, **options: Any) -> Any:
    """A module of the published size, without weights."""
    with torch.device("meta"):
        return kind(**options)


def full_unclip_decoder(**options: Any) -> UNet2DConditionModel:
    sizes = {"sample_size": 64, "layers_per_block": 3, "attention_head_dim": 64}
    return full_size(UNet2DConditionModel, **{**UNCLIP, **unclip_blocks(3), **sizes, **options})
