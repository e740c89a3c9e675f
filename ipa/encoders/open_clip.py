"""Image encoders from open_clip: by built-in name, hub id or local folder.

encoder = OpenClipEncoder.from_pretrained("local-dir:demo/encoder")
encoder = OpenClipEncoder.from_pretrained("ViT-H-14", pretrained="laion2b_s32b_b79k")
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ipa.encoders.image_encoder import ImageEncoder, Uses, pair, read_dtype, square_edge
from ipa.errors import MissingWeights, UserError, brief
from ipa.types import EncoderWidths, Features

LOCAL, HUB = "local-dir:", "hf-hub:"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")


class OpenClipEncoder(ImageEncoder):
    """The image tower of an open_clip model; patches are those of a vision transformer with a class token."""

    def __init__(self, visual: Any, source: str = "", weights: str | None = None) -> None:
        preprocess = visual.preprocess_cfg
        super().__init__(visual, widths_of(visual, source), preprocess["mean"], preprocess["std"], source, weights)

    @classmethod
    def from_pretrained(cls, name: str, pretrained: str | None = None, dtype: str = "float32") -> Self:
        """Load open_clip's ``name``: built-in, ``hf-hub:…`` or ``local-dir:FOLDER``.

        A built-in one needs ``pretrained``: open_clip's tag of its weights, or a file of them (pickles only as far as
        torch's ``weights_only`` reads them). Raises UserError for what is not there, ValueError for an unknown
        name or tag, weights that do not fit, and a built-in name without weights, which would start at random.
        """
        torch_dtype = read_dtype(dtype)
        config = read_config(name)
        check_weights(name, pretrained)
        if pretrained is None and is_built_in(name):
            raise UserError(f"encoder.name={name} needs encoder.pretrained=: {offer_weights(name)}")
        visual = load_tower(name, pretrained)
        visual.output_dim = config["embed_dim"]  # timm's towers do not say it
        return cls(visual.to(torch_dtype), name, pretrained)

    @classmethod
    def read_widths(cls, name: str, pretrained: str | None = None, dtype: str | None = None) -> EncoderWidths:
        """Widths from the configuration alone, so that a misfit is found before weights are read.

        Takes what ``from_pretrained`` takes and raises as it does, but needs no weights.
        """
        if dtype is not None:
            read_dtype(dtype)
        config = read_config(name)
        check_weights(name, pretrained)
        vision = config["vision_cfg"]
        edge = square_edge(vision.get("image_size", 224), name)  # the defaults here are open_clip's
        if vision.get("timm_model_name") or not isinstance(vision.get("layers", 12), int):
            return EncoderWidths(config["embed_dim"], 0, 0, edge)
        rows, columns = (edge // size for size in pair(vision.get("patch_size", 16)))
        return EncoderWidths(config["embed_dim"], vision.get("width", 768), 1 + rows * columns, edge)

    def _features(self, normalized_B3HW: Tensor, uses: Uses) -> Features:
        if uses == "pooled":
            pooled = self.visual(normalized_B3HW)
            return Features(pooled_BE=pooled if isinstance(pooled, Tensor) else pooled[0])  # CoCa adds its tokens
        out = self.visual.forward_intermediates(
            normalized_B3HW, indices=[-2], output_extra_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        patches, extra = out["image_intermediates"][0], out["image_intermediates_prefix"][0]
        return Features(patches_BPF=torch.cat([extra, patches], dim=1))


def widths_of(visual: Any, source: str) -> EncoderWidths:
    """Widths of a loaded tower; only open_clip's own vision transformer has a position for every patch."""
    edge = square_edge(visual.image_size, source)
    positions_PF = getattr(visual, "positional_embedding", None)
    num_patches, patch_width = (0, 0) if positions_PF is None else positions_PF.shape
    return EncoderWidths(visual.output_dim, patch_width, num_patches, edge)


def load_tower(name: str, pretrained: str | None) -> Any:
    """The image tower with its weights and ``preprocess_cfg``; the text tower is let go."""
    import open_clip

    try:
        model = open_clip.create_model(
            resolve_name(name), pretrained=pretrained, precision="fp32", require_pretrained=True, weights_only=True
        )
    except Exception as error:  # open_clip lets through whatever breaks: pickle's, safetensors', torch's, the hub's
        given = f"encoder.name={name}" + (f" encoder.pretrained={pretrained}" if pretrained else "")
        raise UserError(f"{given}: the weights cannot be loaded: {brief(error)}") from error
    visual: Any = model.visual
    visual.preprocess_cfg = open_clip.get_model_preprocess_cfg(model)
    return visual


def is_built_in(name: str) -> bool:
    return not name.startswith((LOCAL, HUB))


def resolve_name(name: str) -> str:
    """Check a ``local-dir:`` folder and make it absolute, since open_clip resolves some paths late."""
    if not name.startswith(LOCAL):
        return name
    folder = Path(name.removeprefix(LOCAL))
    if not (folder / "open_clip_config.json").is_file():
        raise MissingWeights(f"encoder.name={name}: there is no open_clip_config.json in {folder}")
    return f"{LOCAL}{folder.resolve()}"


def read_config(name: str) -> dict[str, Any]:
    """open_clip's description of a model, ``embed_dim`` and ``vision_cfg`` among it."""
    import open_clip

    try:
        config = open_clip.get_model_config(resolve_name(name))
    except json.JSONDecodeError as error:
        raise UserError(f"encoder.name={name}: its open_clip_config.json is not JSON: {error}") from error
    except (OSError, ValueError) as error:
        if not name.startswith(HUB):
            raise
        raise MissingWeights(f"encoder.name={name}: the hub gives no open_clip_config.json: {brief(error)}") from error
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), 1)
        question = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"encoder.name={name}: open_clip has no such model; `local-dir:FOLDER` names one of your own.{question}"
        )
    if not {"embed_dim", "vision_cfg"} <= set(config):
        raise UserError(
            f"encoder.name={name}: its open_clip_config.json has no model_cfg with embed_dim and vision_cfg"
        )
    return config


def check_weights(name: str, pretrained: str | None) -> None:
    """Refuse a tag or file that open_clip would not find, ignore, or run with another activation; reads no weight."""
    import open_clip

    if pretrained is None:
        return
    given = f"encoder.name={name} encoder.pretrained={pretrained}"
    if not is_built_in(name):
        raise UserError(f"{given}: a model of this kind has its own weights; give encoder.pretrained=null")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if tag:
        twin = f"{name}-quickgelu"
        if tag.get("quick_gelu") and twin in open_clip.list_models():
            raise UserError(f"{given}: these weights were trained with QuickGELU; give encoder.name={twin}")
    elif not pretrained.endswith(WEIGHT_FILES):
        raise UserError(f"{given}: open_clip knows no such weights; {offer_weights(name)}")
    elif not Path(pretrained).is_file():
        raise MissingWeights(f"{given}: there is no such file; {offer_weights(name)}")


def offer_weights(name: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    return f"give one of {', '.join([*tags, 'a file'])} ({', '.join(WEIGHT_FILES)})"


def read_pooled_width(name: str) -> int:
    return OpenClipEncoder.read_widths(name).pooled
