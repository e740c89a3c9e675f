"""Tiny encoders of every kind, on disk: open_clip's towers and transformers' vision models, random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from ipa.encoders.image_encoder import ImageEncoder
from ipa.types import to_unit_range

SIZES = {
    "hidden_size": tiny.PATCH_WIDTH,
    "intermediate_size": 4 * tiny.PATCH_WIDTH,
    "num_hidden_layers": tiny.VISION_LAYERS,
    "num_attention_heads": 3,
    "image_size": tiny.REFERENCE_PX,
    "patch_size": 8,
}
TIMM = {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None}
VISION = tiny.clip_config()["vision_cfg"]
TOWERS = {
    "oblong_patches": VISION | {"image_size": [24, 24], "patch_size": [8, 12]},
    "with_tokens": VISION | {"output_tokens": True},  # CoCa's tower returns its tokens too
    "timm": TIMM,
    "timm_without_class_token": TIMM | {"timm_model_name": "test_vit_relpos", "timm_pool": "avg", "image_size": 160},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
    "convnext": TIMM | {"timm_model_name": "test_convnext", "timm_pool": "avg", "image_size": 96},
}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def save_tower(folder: Path, vision: dict[str, Any]) -> str:
    """An open_clip folder with this image tower; returns its ``local-dir:`` name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny.clip_config() | {"vision_cfg": vision}
    content = {"model_cfg": config, "preprocess_cfg": tiny.preprocess_config()}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def save_clip_vision(folder: Path) -> str:
    """A CLIPVisionModelWithProjection with the weights of ``tiny.make_encoder``, without a preprocessor."""
    tiny.make_vision(tiny.make_encoder()).save_pretrained(folder)
    return str(folder)


def save_vision_model(folder: Path, name: str, preprocessing: dict[str, Any]) -> str:
    config = getattr(transformers, f"{name}Config")(**SIZES)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return str(folder)


def save_whole_clip(folder: Path) -> str:
    """The weights of ``tiny.make_encoder`` in a CLIP with a text tower."""
    vision = tiny.make_vision(tiny.make_encoder())
    ends = {"bos_token_id": len(tiny.VOCABULARY) - 2, "eos_token_id": len(tiny.VOCABULARY) - 1}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = CLIPTextConfig(vocab_size=len(tiny.VOCABULARY), **sizes, **ends)
    clip = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.config.to_dict(), projection_dim=tiny.POOLED_WIDTH)
    )
    clip.load_state_dict(vision.state_dict(), strict=False)
    clip.save_pretrained(folder)
    return str(folder)


CROPPED = HALVES | {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
MAKERS: dict[str, Callable[[Path], str]] = {
    "clip": save_clip_vision,
    "whole_clip": save_whole_clip,
    "siglip": partial(save_vision_model, name="SiglipVision", preprocessing=HALVES),
    "dinov2": partial(save_vision_model, name="Dinov2", preprocessing=CROPPED),
    "registers": partial(
        save_vision_model, name="Dinov2WithRegisters", preprocessing=HALVES | {"size": {"height": 24, "width": 24}}
    ),
    **{name: partial(save_tower, vision=vision) for name, vision in TOWERS.items()},
}


class Sources(dict[str, str]):
    """Source of an encoder by its kind, as ``open_encoder`` takes it; made when it is first asked for."""

    def __init__(self, folder: Path, **made: str) -> None:
        super().__init__(**made)
        self.folder = folder

    def __missing__(self, name: str) -> str:
        torch.manual_seed(0)
        self[name] = MAKERS[name](self.folder / name)
        return self[name]


@pytest.fixture(autouse=True)
def _measured_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageEncoder, "_measure", ImageEncoder._measure.__wrapped__)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, clip_name: str) -> dict[str, str]:
    return Sources(tmp_path_factory.mktemp("encoders"), open_clip=clip_name)


@pytest.fixture(scope="session")
def image() -> Any:
    return to_unit_range(tiny.make_pictures(3, tiny.REFERENCE_PX))
