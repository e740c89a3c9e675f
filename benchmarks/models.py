"""The models that are measured: the demo world's, and the published bases at full size with random weights.

Random weights cost what trained ones cost, and need no model hub.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from ipa.adapter.heads import GlobalHead, ResamplerHead
from ipa.adapter.kinds import DecoupledAdapter
from ipa.adapter.time_resampler import TimeResamplerHead
from ipa.encoders.open_clip import OpenClipEncoder
from ipa.encoders.vision_model import VisionModelEncoder
from ipa.families.chroma import Chroma
from ipa.families.flux import Flux
from ipa.families.hollow import make_hollow
from ipa.families.published import sd15, sdxl
from ipa.families.sd3 import StableDiffusion3
from ipa.families.sdxl import StableDiffusionXL
from ipa.families.stable_diffusion import StableDiffusion
from ipa.model import IPAdapterModel

HEADS: dict[str, Callable[..., Any]] = {"global": GlobalHead.fitting, "fine_grained": ResamplerHead.fitting}
SDXL_RESAMPLER = {"width": 1280, "heads": 20}


def make_demo(head: str = "global") -> IPAdapterModel:
    family = StableDiffusion.from_pretrained("demo/base")
    sizes = {"width": 64, "heads": 1} if head == "fine_grained" else {}
    return put_together(family, OpenClipEncoder.from_pretrained("local-dir:demo/encoder"), head, **sizes)


def make_sd15(head: str = "global") -> IPAdapterModel:
    return put_together(StableDiffusion(**sd15(), source="random"), make_vit_h(), head)


def make_sdxl(head: str = "global") -> IPAdapterModel:
    sizes = SDXL_RESAMPLER if head == "fine_grained" else {}
    return put_together(StableDiffusionXL(**sdxl(), source="random"), make_vit_h(), head, **sizes)


def make_flux(family: type[Flux], path: str) -> Callable[..., IPAdapterModel]:
    """With CLIP ViT-L/14 and four tokens, as XLabs' adapter."""
    return lambda head="global": put_together(make_hollow(family, path), make_clip("ViT-L-14-quickgelu", 768), head)


def make_sd3(path: str) -> Callable[..., IPAdapterModel]:
    """With SigLIP and 64 tokens that depend on the time, as InstantX' adapter."""

    def make(head: str = "global") -> IPAdapterModel:
        family, encoder = make_hollow(StableDiffusion3, path), make_siglip()
        made = TimeResamplerHead.fitting(encoder.widths, family.context_width)
        return IPAdapterModel(family, encoder, made, DecoupledAdapter(family.hosts()))

    return make


MAKERS = {
    "demo": make_demo,
    "sd15": make_sd15,
    "sdxl": make_sdxl,
    "flux": make_flux(Flux, "black-forest-labs/FLUX.1-dev"),
    "chroma": make_flux(Chroma, "lodestones/Chroma1-HD"),
    "sd3_medium": make_sd3("stabilityai/stable-diffusion-3-medium-diffusers"),
    "sd35_medium": make_sd3("stabilityai/stable-diffusion-3.5-medium"),
    "sd35_large": make_sd3("stabilityai/stable-diffusion-3.5-large"),
}
IMAGE_PX = {"demo": 64, "sd15": 512, "sdxl": 1024}
TRANSFORMERS_PX = 512  # as in their recipes


def make_vit_h() -> OpenClipEncoder:
    return make_clip("ViT-H-14", 1024)


def make_clip(name: str, width: int) -> OpenClipEncoder:
    import open_clip

    clip: Any = open_clip.create_model(name, load_weights=False, device=torch.get_default_device())
    clip.visual.preprocess_cfg = open_clip.get_model_preprocess_cfg(clip)
    clip.visual.output_dim = width
    return OpenClipEncoder(clip.visual, "random")


def make_siglip() -> VisionModelEncoder:
    """So400m/14 at 384 px."""
    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    return VisionModelEncoder(SiglipVisionModel(config), "random", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})


def put_together(family: Any, encoder: Any, head: str, **sizes: int) -> IPAdapterModel:
    made = HEADS[head](encoder.widths, family.context_width, **sizes)
    return IPAdapterModel(family, encoder, made, DecoupledAdapter(family.hosts()))
