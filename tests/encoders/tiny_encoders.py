"""Tiny encoders of all kinds in one folder: open_clip's towers and transformers' vision models, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import tiny
import transformers
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

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
