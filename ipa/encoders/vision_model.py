"""Image encoders in transformers' layout: CLIP, SigLIP, DINOv2, ViT and every other vision model that it can load.

encoder = VisionModelEncoder.from_pretrained("h94/IP-Adapter", subfolder="models/image_encoder")
encoder = VisionModelEncoder.from_pretrained("google/siglip-so400m-patch14-384")
encoder = VisionModelEncoder.from_pretrained("facebook/dinov2-base", layer=-1)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ipa.encoders.image_encoder import PENULTIMATE, ImageEncoder, Uses, square_edge
from ipa.errors import MissingWeights, UserError, brief
from ipa.files import is_hub_id
from ipa.weights import read_dtype

CLIP = "clip_vision_model"
PREPROCESSING = "preprocessor_config.json"


class Folder(NamedTuple):
    """A model's files: ``source`` as given, ``root`` a local folder or hub id, ``subfolder`` within it.

    ``option`` is what the user gave ``source`` as, for messages.
    """

    source: str
    root: str
    subfolder: str
    option: str = "encoder.path"

    @property
    def given(self) -> str:
        return f"{self.option}={self.source}"

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, None if there is no such file. Raises UserError."""
        try:
            file = self._find(name)
            return None if file is None else json.loads(file.read_bytes())
        except OSError as error:
            raise MissingWeights(f"{self.given}: {name} cannot be read: {brief(error)}") from error
        except ValueError as error:
            raise UserError(f"{self.given}: {name} cannot be read: {brief(error)}") from error

    def _find(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        if Path(self.root).is_dir():
            file = Path(self.root, self.subfolder, name)
            return file if file.is_file() else None
        try:
            return Path(hf_hub_download(self.root, name, subfolder=self.subfolder or None))
        except EntryNotFoundError:  # raised for the cache too, when the hub cannot be reached
            return None


class VisionModelEncoder(ImageEncoder):
    """A vision model of transformers; patch features are ``hidden_states[layer]``.

    The pooled embedding is CLIP's projected ``image_embeds``, and ``pooler_output`` of any other model.
    ``preprocessing`` is the content of preprocessor_config.json: mean and standard deviation, and the image size after
    its crop. Without it CLIP's mean is used for CLIP, as the published IP-Adapters do; other models need it.
    """

    def __init__(
        self, visual: Any, source: str = "", preprocessing: Mapping[str, Any] | None = None, layer: int = PENULTIMATE
    ) -> None:
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        content = dict(preprocessing or {})
        if visual.config.model_type == CLIP:
            content = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD} | content
        if not {"image_mean", "image_std"} <= set(content):
            raise UserError(
                f"encoder.path={source}: there is no preprocessor_config.json with image_mean and image_std"
            )
        edge = square_edge(read_size(content) or visual.config.image_size, source)
        super().__init__(visual, edge, content["image_mean"], content["image_std"], source, layer=layer)

    @classmethod
    def from_pretrained(
        cls, path: str, subfolder: str | None = None, dtype: str = "float32", layer: int = PENULTIMATE
    ) -> Self:
        """Load a folder or hub id; the subfolder can be part of it: ``h94/IP-Adapter/models/image_encoder``.

        Raises UserError for what is not found, is not a vision model, or lacks weights.
        """
        torch_dtype, folder = read_dtype(dtype, "encoder.dtype"), locate(path, subfolder)
        visual = load_network(folder, read_config(folder))
        return cls(visual.to(torch_dtype), folder.source, folder.read_json(PREPROCESSING), layer)

    @classmethod
    def make_hollow(
        cls, path: str, subfolder: str | None = None, dtype: str = "float32", layer: int = PENULTIMATE
    ) -> Self:
        """On the meta device, from the JSON files alone."""
        torch_dtype, folder = read_dtype(dtype, "encoder.dtype"), locate(path, subfolder)
        config = read_config(folder)
        with torch.device("meta"):
            visual = network_class(config)(config).to(torch_dtype)
            return cls(visual, folder.source, folder.read_json(PREPROCESSING), layer)

    def forward(self, normalized_B3HW: Tensor, uses: Uses) -> Tensor | None:
        if uses == "patches":
            return self.visual(normalized_B3HW, output_hidden_states=True).hidden_states[self.layer]
        out = self.visual(normalized_B3HW)
        return out.image_embeds if self.visual.config.model_type == CLIP else out.pooler_output

    @torch.no_grad()
    def embed_text(self, text: str) -> Tensor:
        """As the contract, for the folder of a whole CLIP; it is loaded again for its text tower, which is not kept."""
        from transformers import AutoTokenizer, CLIPModel

        folder = locate(self.source)
        if (folder.read_json("config.json") or {}).get("model_type") != "clip":
            return super().embed_text(text)
        where: Any = {"subfolder": folder.subfolder}
        clip = CLIPModel.from_pretrained(folder.root, dtype="float32", weights_only=True, **where).eval()
        tokens = AutoTokenizer.from_pretrained(folder.root, **where)([text], truncation=True, return_tensors="pt")
        return clip.text_projection(clip.text_model(**tokens).pooler_output).to(self.mean.device)


def read_size(preprocessing: Mapping[str, Any]) -> int | list[int] | None:
    """The image size after the crop, else after the resizing; None if neither gives both sides."""
    sizes = [preprocessing.get("crop_size") if preprocessing.get("do_center_crop", True) else None]
    for size in (*sizes, preprocessing.get("size")):
        if isinstance(size, dict) and {"height", "width"} <= set(size):
            return [size["height"], size["width"]]
    return None


def network_class(config: Any) -> Any:
    from transformers import MODEL_MAPPING, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection if config.model_type == CLIP else MODEL_MAPPING[type(config)]


def locate(path: str, subfolder: str | None = None, option: str = "encoder.path") -> Folder:
    """A local folder, or a hub id with exactly one slash and a subfolder after a second one. Raises UserError."""
    source = "/".join(part.rstrip("/") for part in (path, subfolder) if part)
    if Path(source).is_dir():
        return Folder(source, source, "", option)
    owner, name, *rest = [*source.split("/"), ""]
    if not is_hub_id(f"{owner}/{name}"):
        raise MissingWeights(
            f"{option}={source}: no such folder. Give a folder in transformers' layout, or a hub id owner/name, "
            "followed by the subfolder if there is one"
        )
    return Folder(source, f"{owner}/{name}", "/".join(rest).rstrip("/"), option)


def read_config(folder: Folder) -> Any:
    """transformers' configuration of the vision model, which can be one half of a whole CLIP or SigLIP."""
    from transformers import AutoConfig

    content = folder.read_json("config.json")
    if content is None:
        raise MissingWeights(f"{folder.given}: {explain_missing_config(Path(folder.source))}")
    try:
        config: Any = AutoConfig.for_model(**content)
        config = getattr(config, "vision_config", config)
        network_class(config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder.given} holds a model of type {content.get('model_type')}, which is not a vision "
            f"model of transformers: {brief(error)}"
        ) from error
    square_edge(config.image_size, folder.source)
    return config


def explain_missing_config(folder: Path) -> str:
    if (folder / "open_clip_config.json").is_file():
        return f"the folder holds an open_clip model: use encoder=demo encoder.name=local-dir:{folder}"
    if folder.is_dir():
        return "there is no config.json in this folder"
    return "there is no such folder, and the hub (or its cache, if it cannot be reached) has no config.json"


def load_network(folder: Folder, config: Any, unused: str | None = None) -> Any:
    """The network with all its weights; transformers alone would initialise missing ones at random.

    Only weights whose names start with ``unused`` may be missing.
    """
    try:
        visual, info = network_class(config).from_pretrained(
            folder.root,
            config=config,
            subfolder=folder.subfolder,
            dtype="float32",
            weights_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever breaks: errors of pickle, safetensors, torch and the hub
        raise UserError(f"{folder.given}: the weights cannot be loaded: {brief(error)}") from error
    if missing := sorted(key for key in info["missing_keys"] if not (unused and key.startswith(unused))):
        raise UserError(f"{folder.given}: {len(missing)} weights are missing, {missing[0]} among them")
    return visual
