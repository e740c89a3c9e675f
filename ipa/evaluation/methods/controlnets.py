"""Pipelines of diffusers with a ControlNet (Zhang et al. 2023) around a family's parts."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

from ipa.contracts import Family

PIPELINES: dict[str, Any] = {
    "stable_diffusion": StableDiffusionControlNetPipeline,
    "sdxl": StableDiffusionXLControlNetPipeline,
}


def controlnet_pipeline(family: Family, controlnet: Any) -> Any:
    return family.pipeline(PIPELINES[family.name], controlnet=controlnet)
