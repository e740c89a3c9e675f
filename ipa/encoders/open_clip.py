"""Image encoders from open_clip: by built-in name, hub id or local folder.

encoder = OpenClipEncoder.from_pretrained("local-dir:demo/encoder")
encoder = OpenClipEncoder.from_pretrained("ViT-H-14", pretrained="laion2b_s32b_b79k")
encoder = OpenClipEncoder.from_pretrained("ViT-SO400M-14-SigLIP-384", pretrained="webli")
"""

from __future__ import annotations

import difflib
import functools
import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ipa.encoders.image_encoder import PENULTIMATE, ImageEncoder, Uses, square_edge
from ipa.errors import MissingWeights, UserError, brief
from ipa.weights import read_dtype

LOCAL, HUB = "local-dir:", "hf-hub:"
WEIGHT_EXTENSIONS = (".safetensors", ".bin", ".pt", ".pth")


class OpenClipEncoder(ImageEncoder):
    """The image tower of an open_clip model; vision transformers have patch features, timm's among them."""

    def __init__(self, visual: Any, source: str = "", weights: str | None = None, layer: int = PENULTIMATE) -> None:
        preprocess, edge = visual.preprocess_cfg, square_edge(visual.image_size, source)
        super().__init__(visual, edge, preprocess["mean"], preprocess["std"], source, weights, layer)

    @classmethod
    def from_pretrained(
        cls, name: str, pretrained: str | None = None, dtype: str = "float32", layer: int = PENULTIMATE
    ) -> Self:
        """Load open_clip's ``name``: built-in, ``hf-hub:…`` or ``local-dir:FOLDER``.

        A built-in one needs ``pretrained``, or open_clip would initialise it at random: a tag of its weights, or a file
        (a pickle is read with torch's ``weights_only``). Raises UserError for what is unknown, missing or does not fit.
        """
        torch_dtype = read_dtype(dtype, "encoder.dtype")
        read_config(name)
        check_weights(name, pretrained)
        if pretrained is None and is_built_in(name):
            raise UserError(f"encoder.name={name} needs encoder.pretrained=: {offer_weights(name)}")
        return cls(load_tower(name, pretrained).to(torch_dtype), name, pretrained, layer)

    @classmethod
    def make_hollow(
        cls, name: str, pretrained: str | None = None, dtype: str = "float32", layer: int = PENULTIMATE
    ) -> Self:
        """On the meta device, from the configuration alone."""
        torch_dtype, config = read_dtype(dtype, "encoder.dtype"), read_config(name)
        check_weights(name, pretrained)
        with torch.device("meta"):
            return cls(make_tower(config).to(torch_dtype), name, pretrained, layer)

    def forward(self, normalized_B3HW: Tensor, uses: Uses) -> Tensor | None:
        return self.pooled(normalized_B3HW) if uses == "pooled" else self.patches(normalized_B3HW)

    def pooled(self, normalized_B3HW: Tensor) -> Tensor:
        pooled = self.visual(normalized_B3HW)
        return pooled if isinstance(pooled, Tensor) else pooled[0]  # CoCa's tower returns its tokens too

    def patches(self, normalized_B3HW: Tensor) -> Tensor | None:
        prefix = num_prefix_tokens(self.visual)
        if prefix is None:
            return None
        out = self.visual.forward_intermediates(
            normalized_B3HW,
            indices=[self.layer],
            output_extra_tokens=prefix > 0,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return torch.cat([*out.get("image_intermediates_prefix", []), *out["image_intermediates"]], dim=1)

    def embed_text(self, text: str) -> Tensor:
        """As the contract; the model is loaded again for its text tower, which is not kept."""
        return embed_text(self.source, self.weights, text).to(self.mean.device)


@functools.lru_cache
@torch.no_grad()
def embed_text(name: str, pretrained: str | None, text: str) -> Tensor:
    """embedding_1E by a model's text tower, not normalised."""
    import open_clip

    model: Any = load_clip(name, pretrained).eval()
    return model.encode_text(open_clip.get_tokenizer(resolve_name(name))([text]))


def num_prefix_tokens(visual: Any) -> int | None:
    """Class and register tokens of a vision transformer; None for ResNets and timm's convolutions, without patches."""
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer):
        return 1
    trunk = getattr(visual, "trunk", None)  # of timm
    if trunk is None or "return_prefix_tokens" not in inspect.signature(trunk.forward_intermediates).parameters:
        return None
    return trunk.num_prefix_tokens


def make_tower(config: dict[str, Any]) -> Any:
    """The image tower of a configuration, not initialised with weights."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    visual: Any = open_clip.CLIP(config["embed_dim"], vision, {}, config.get("quick_gelu", False)).visual
    visual.preprocess_cfg = asdict(PreprocessCfg())
    return visual


def load_tower(name: str, pretrained: str | None) -> Any:
    """The image tower with its weights and ``preprocess_cfg``; the text tower is discarded."""
    import open_clip

    model: Any = load_clip(name, pretrained)
    visual: Any = model.visual
    visual.preprocess_cfg = open_clip.get_model_preprocess_cfg(model)
    return visual


def load_clip(name: str, pretrained: str | None) -> Any:
    """The whole model; raises UserError."""
    import open_clip

    try:
        return open_clip.create_model(
            resolve_name(name), pretrained=pretrained, precision="fp32", require_pretrained=True, weights_only=True
        )
    except Exception as error:  # open_clip raises whatever breaks: errors of pickle, safetensors, torch and the hub
        given = f"encoder.name={name}" + (f" encoder.pretrained={pretrained}" if pretrained else "")
        raise UserError(f"{given}: the weights cannot be loaded: {brief(error)}") from error


def is_built_in(name: str) -> bool:
    return not name.startswith((LOCAL, HUB))


def resolve_name(name: str, option: str = "encoder.name") -> str:
    """Check a ``local-dir:`` folder and make it absolute, since open_clip resolves some paths late."""
    if not name.startswith(LOCAL):
        return name
    folder = Path(name.removeprefix(LOCAL))
    if not (folder / "open_clip_config.json").is_file():
        raise MissingWeights(f"{option}={name}: there is no open_clip_config.json in {folder}")
    return f"{LOCAL}{folder.resolve()}"


def read_config(name: str) -> dict[str, Any]:
    """open_clip's description of a model, with ``embed_dim`` and ``vision_cfg``."""
    import open_clip

    resolved = resolve_name(name)
    try:
        config = open_clip.get_model_config(resolved)
    except (OSError, ValueError) as error:
        raise MissingWeights(f"encoder.name={name}: open_clip_config.json cannot be read: {brief(error)}") from error
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), 1)
        question = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"encoder.name={name}: open_clip has no such model; use `local-dir:FOLDER` for a local one.{question}"
        )
    if not {"embed_dim", "vision_cfg"} <= set(config):
        raise UserError(
            f"encoder.name={name}: its open_clip_config.json has no model_cfg with embed_dim and vision_cfg"
        )
    return config


def check_weights(name: str, pretrained: str | None) -> None:
    """Refuse weights that open_clip would not find, would ignore, or would run with another activation."""
    import open_clip

    if pretrained is None:
        return
    given = f"encoder.name={name} encoder.pretrained={pretrained}"
    if not is_built_in(name):
        raise UserError(f"{given}: this model comes with its own weights; give encoder.pretrained=null")
    if tag := open_clip.get_pretrained_cfg(name, pretrained):
        twin = f"{name}-quickgelu"
        if tag.get("quick_gelu") and twin in open_clip.list_models():
            raise UserError(f"{given}: these weights were trained with QuickGELU; give encoder.name={twin}")
    elif not pretrained.endswith(WEIGHT_EXTENSIONS):
        raise UserError(f"{given}: open_clip knows no such weights; {offer_weights(name)}")
    elif not Path(pretrained).is_file():
        raise MissingWeights(f"{given}: there is no such file; {offer_weights(name)}")


def offer_weights(name: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    return f"give one of {', '.join([*tags, 'a file'])} ({', '.join(WEIGHT_EXTENSIONS)})"
