"""Images and captions to score, and transformers' whole CLIP with the weights of the tiny one."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from ipa.types import to_unit_range

CAPTIONS = [["cat", "a dog"], ["a dog"], ["red hearts", "b", "cat"], ["b"], ["", "the end"], ["the end"]]


def images(seed: int, count: int = 6, size_px: int = tiny.REFERENCE_PX) -> Tensor:
    return to_unit_range(tiny.make_pictures(count, size_px, seed))


def told(metric: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


def transformers_clip() -> CLIPModel:
    from make_clip import to_transformers

    clip, config = tiny.make_clip(), tiny.clip_config()
    text, vision = config["text_cfg"], config["vision_cfg"]
    twin = CLIPModel(
        CLIPConfig(
            text_config={
                "vocab_size": text["vocab_size"],
                "hidden_size": text["width"],
                "intermediate_size": 4 * text["width"],
                "num_hidden_layers": text["layers"],
                "num_attention_heads": text["heads"],
                "max_position_embeddings": text["context_length"],
                "hidden_act": "gelu",
                "bos_token_id": text["vocab_size"] - 2,
                "eos_token_id": text["vocab_size"] - 1,
            },
            vision_config={
                "hidden_size": vision["width"],
                "intermediate_size": 4 * vision["width"],
                "num_hidden_layers": vision["layers"],
                "num_attention_heads": vision["width"] // vision["head_width"],
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "hidden_act": "gelu",
            },
            projection_dim=config["embed_dim"],
        )
    )
    weights = to_transformers(clip.visual.state_dict(), vision["layers"]) | text_to_transformers(clip, text["layers"])
    missing, unknown = twin.load_state_dict(weights, strict=False)
    assert not unknown and all("position_ids" in name or name == "logit_scale" for name in missing)
    return twin.eval()


def text_to_transformers(clip: Any, layers: int) -> dict[str, Tensor]:
    """The text tower is built as the image tower is: the same key map, after some names have been changed."""
    from make_clip import to_transformers

    state = clip.state_dict()
    blocks = {name: value for name, value in state.items() if name.startswith("transformer.")}
    nothing = torch.zeros(0, 0)
    as_vision = {
        **blocks,
        **{f"ln_{place}.{kind}": state[f"ln_final.{kind}"] for place in ("pre", "post") for kind in ("weight", "bias")},
        **dict.fromkeys(("class_embedding", "conv1.weight", "proj"), nothing),
        "positional_embedding": state["positional_embedding"],
    }
    mapped = to_transformers(as_vision, layers)
    renamed = {name.replace("vision_model", "text_model"): value for name, value in mapped.items() if value.numel()}
    wanted = {name: value for name, value in renamed.items() if "pre_layrnorm" not in name}
    return {
        **{name.replace("post_layernorm", "final_layer_norm"): value for name, value in wanted.items()},
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_projection.weight": state["text_projection"].T.contiguous(),
    }
