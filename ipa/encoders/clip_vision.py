"""Image encoders in transformers' layout, as the encoders of the published IP-Adapters are stored.

encoder = ClipVisionEncoder.from_pretrained("demo/image_encoder")
encoder = ClipVisionEncoder.from_pretrained("h94/IP-Adapter", subfolder="models/image_encoder")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from ipa.encoders.image_encoder import ImageEncoder, Uses, read_dtype, square_edge
from ipa.errors import MissingWeights, UserError, brief
from ipa.types import EncoderWidths, Features

# what config.json may call itself: the image tower alone, or a whole CLIP of which the image tower is read
MODEL_TYPES = ("clip_vision_model", "clip")


class ClipVisionEncoder(ImageEncoder):
    """transformers' ``CLIPVisionModelWithProjection``."""

    def __init__(
        self,
        visual: Any,
        source: str = "",
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        super().__init__(visual, widths_of(visual, source), mean or OPENAI_CLIP_MEAN, std or OPENAI_CLIP_STD, source)

    @classmethod
    def from_pretrained(cls, path: str, subfolder: str | None = None, dtype: str = "float32") -> Self:
        """Load a folder or hub id, with the subfolder apart or behind it: ``h94/IP-Adapter/models/image_encoder``.

        Mean and standard deviation of the pixels are those of preprocessor_config.json, CLIP's where there is none, as
        with the published IP-Adapters. Raises UserError for what is not there, ValueError for what is no CLIP
        image encoder or lacks weights.
        """
        torch_dtype = read_dtype(dtype)
        source, root, folder = locate(path, subfolder)
        read_config(source, root, folder)
        preprocess = read_json(find_file(root, folder, "preprocessor_config.json")) or {}
        visual = load_network(source, root, folder)
        return cls(visual.to(torch_dtype), source, preprocess.get("image_mean"), preprocess.get("image_std"))

    @classmethod
    def read_widths(cls, path: str, subfolder: str | None = None, dtype: str | None = None) -> EncoderWidths:
        """Widths from config.json alone; takes what ``from_pretrained`` takes and raises as it does."""
        if dtype is not None:
            read_dtype(dtype)
        source, root, folder = locate(path, subfolder)
        config = read_config(source, root, folder)
        edge = square_edge(config.image_size, source)
        return EncoderWidths(config.projection_dim, config.hidden_size, 1 + (edge // config.patch_size) ** 2, edge)

    def _features(self, normalized_B3HW: Tensor, uses: Uses) -> Features:
        if uses == "pooled":
            return Features(pooled_BE=self.visual(normalized_B3HW).image_embeds)
        return Features(patches_BPF=self.visual(normalized_B3HW, output_hidden_states=True).hidden_states[-2])


def widths_of(visual: Any, source: str) -> EncoderWidths:
    num_patches, patch_width = visual.vision_model.embeddings.position_embedding.weight.shape
    edge = square_edge(visual.config.image_size, source)
    return EncoderWidths(visual.visual_projection.out_features, patch_width, num_patches, edge)


def load_network(source: str, root: str, folder: str) -> Any:
    """The network with all its weights: transformers alone would start what is missing at random."""
    from transformers import CLIPVisionModelWithProjection

    loader: Any = CLIPVisionModelWithProjection  # its types do not know that output_loading_info gives a pair
    try:
        visual, info = loader.from_pretrained(
            root, subfolder=folder, dtype="float32", weights_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers lets through whatever breaks: pickle's, safetensors', torch's, the hub's
        raise UserError(f"encoder.path={source}: the weights cannot be loaded: {brief(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"encoder.path={source}: {len(missing)} weights are missing, {missing[0]} among them")
    return visual


def locate(path: str, subfolder: str | None = None) -> tuple[str, str, str]:
    """The whole source in one string, and what transformers takes: a local folder or hub id, and the subfolder in it.

    A hub id has exactly one slash: what comes behind a second one is a subfolder.
    """
    source = "/".join(part.rstrip("/") for part in (path, subfolder) if part)
    if Path(source).is_dir():
        return source, source, ""
    if "/" not in source or source.startswith((".", "/", "~")):
        raise MissingWeights(
            f"encoder.path={source}: no such folder. Give the folder of a CLIPVisionModelWithProjection, or a hub id "
            "owner/name with the subfolder behind it, if any"
        )
    owner, name, *rest = source.split("/")
    return source, f"{owner}/{name}", "/".join(rest)


def find_file(root: str, folder: str, name: str) -> Path | None:
    """A file of a local folder or of the hub (its cache, when it is out of reach); None where there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if Path(root).is_dir():
        file = Path(root, folder, name)
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(root, name, subfolder=folder or None))
    except EntryNotFoundError:
        return None


def read_json(file: Path | None) -> Any:
    return None if file is None else json.loads(file.read_text())


def read_config(source: str, root: str, folder: str) -> Any:
    """transformers' ``CLIPVisionConfig``, its defaults filled in."""
    from transformers import CLIPVisionConfig

    try:
        content = read_json(find_file(root, folder, "config.json"))
    except OSError as error:
        raise MissingWeights(f"encoder.path={source}: config.json cannot be read: {brief(error)}") from error
    except ValueError as error:
        raise UserError(f"encoder.path={source}: config.json cannot be read: {brief(error)}") from error
    if content is None:
        raise MissingWeights(f"encoder.path={source}: {tell_missing_config(source)}")
    if content.get("model_type") not in MODEL_TYPES:
        raise UserError(
            f"encoder.path={source} holds a model of type {content.get('model_type')}; one of {', '.join(MODEL_TYPES)} "
            "is needed"
        )
    return CLIPVisionConfig.from_dict(content.get("vision_config", content))


def tell_missing_config(source: str) -> str:
    if (Path(source) / "open_clip_config.json").is_file():
        return (
            f"there is no config.json in it, but an open_clip model: give encoder=demo encoder.name=local-dir:{source}"
        )
    if Path(source).is_dir():
        return "there is no config.json in it. Give the folder of a CLIPVisionModelWithProjection"
    return "there is no such folder, and the hub (or its cache, when it is out of reach) has no config.json there"
