"""Adapters for transformers at full size, on the meta device: as many parameters as the published files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from ipa.adapter.heads import GlobalHead, MLPHead
from ipa.adapter.kinds import DecoupledAdapter
from ipa.adapter.time_resampler import TimeResamplerHead
from ipa.export.adapter_file import identify
from ipa.export.branches import written_name
from ipa.export.layouts import misreadings
from ipa.export.published import to_published
from ipa.families.flux import find_hosts as find_flux_hosts
from ipa.families.sd3_attention import find_hosts as find_sd3_hosts
from ipa.types import EncoderWidths

CLIP_L, SIGLIP = EncoderWidths(768, 1024, 257, 224), EncoderWidths(1152, 1152, 729, 384)
SD3 = {"attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
LARGE = {**SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
MEDIUM = {
    **SD3,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}


def flux(hosts: str) -> Callable[[], list[Any]]:
    return lambda: find_flux_hosts(FluxTransformer2DModel(guidance_embeds=True), hosts)


def sd3(config: dict[str, Any]) -> Callable[[], list[Any]]:
    return lambda: find_sd3_hosts(SD3Transformer2DModel(**config), 1280)


def global_head(num_tokens: int) -> Callable[[], Any]:
    return lambda: GlobalHead.fitting(CLIP_L, 4096, num_tokens=num_tokens)


def mlp_head() -> Any:
    return MLPHead.fitting(SIGLIP, 4096)


def time_head(width: int) -> Callable[[], Any]:
    return lambda: TimeResamplerHead.fitting(SIGLIP, width)


# hosts, head, layout, parameters, number of hosts, name, and whether diffusers and ComfyUI's nodes read it
CASES: dict[str, Any] = {
    "XLabs v1": (flux("double"), global_head(4), "flux", 490_874_880, 19, "FLUX.1", (True, True)),
    "XLabs v2": (flux("double"), global_head(16), "flux", 528_672_768, 19, "FLUX.1", (True, True)),
    "8 tokens": (flux("double"), global_head(8), "flux", 503_474_176, 19, "FLUX.1", (False, False)),
    "InstantX": (flux("all"), mlp_head, "instantx", 2_645_600_512, 57, "FLUX.1 (all", (False, True)),
    "SD3.5 Large": (sd3(LARGE), time_head(2432), "sd3", 797_925_888, 38, "Large", (True, True)),
    "SD3.5 Medium": (sd3(MEDIUM), time_head(1536), "sd3", 430_686_400, 37, "3.5 Medium", (True, True)),
}


@pytest.mark.parametrize("name", CASES)
def test_parameters_names_and_readers(name: str) -> None:
    make_hosts, make_head, branches, count, num_hosts, base, readers = CASES[name]
    with torch.device("meta"):
        hosts = make_hosts()
        trainable = nn.ModuleDict({"image_proj": make_head(), "ip_adapter": DecoupledAdapter(hosts)})
    tensors = to_published(trainable.state_dict(), torch.float16, branches)
    file = identify({key: tuple(tensor.shape) for key, tensor in tensors.items()})

    assert sum(parameter.numel() for parameter in trainable.parameters()) == file.num_parameters == count
    assert sum(tensor.nbytes for tensor in tensors.values()) == 2 * count
    assert (file.branches, len(file.hidden), len(hosts)) == (branches, num_hosts, num_hosts)
    assert base in file.describe()
    head = trainable["image_proj"]
    found = [not misreadings(head, "decoupled", layout, branches) for layout in ("diffusers", "comfyui")]
    assert tuple(found) == readers
    assert len({written_name(key, branches) for key in tensors}) == len(tensors)
