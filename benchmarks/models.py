"""The models that are measured: the demo world's, and SD 1.5 and SDXL at full size with random weights.

Random weights cost what trained ones cost, and need no model hub.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ipa.adapter.heads import GlobalHead, ResamplerHead
from ipa.adapter.kinds import DecoupledAdapter
from ipa.encoders.open_clip import OpenClipEncoder
from ipa.families.hollow import sd15, sdxl
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


MAKERS = {"demo": make_demo, "sd15": make_sd15, "sdxl": make_sdxl}
IMAGE_PX = {"demo": 64, "sd15": 512, "sdxl": 1024}


def make_vit_h() -> OpenClipEncoder:
    import open_clip

    clip: Any = open_clip.create_model("ViT-H-14", load_weights=False, device=torch.get_default_device())
    clip.visual.preprocess_cfg = open_clip.get_model_preprocess_cfg(clip)
    clip.visual.output_dim = 1024
    return OpenClipEncoder(clip.visual, "random")


def put_together(family: Any, encoder: Any, head: str, **sizes: int) -> IPAdapterModel:
    made = HEADS[head](encoder.widths, family.context_width, **sizes)
    return IPAdapterModel(family, encoder, made, DecoupledAdapter(family.hosts()))
