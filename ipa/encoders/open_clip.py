"""Image encoders from open_clip: by built-in name, hub id or local folder.

encoder = OpenClipEncoder.from_pretrained("local-dir:demo/encoder")
encoder = OpenClipEncoder.from_pretrained("ViT-H-14", pretrained="laion2b_s32b_b79k")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ipa.types import Features

LOCAL = "local-dir:"


class OpenClipEncoder(nn.Module):
    """The image tower of an open_clip model, frozen.

    ``pooled_width`` is E, ``patch_width`` F; ``image_size_px`` the edge of the square picture that it reads.
    """

    visual: Any
    mean: Tensor
    std: Tensor

    def __init__(self, visual: Any, source: str = "", weights: str | None = None) -> None:
        super().__init__()
        self.visual = visual
        self.source, self.weights = source, weights
        preprocess: Any = visual.preprocess_cfg
        self.register_buffer("mean", torch.tensor(preprocess["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocess["std"])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, name: str, pretrained: str | None = None, dtype: str = "float32") -> Self:
        """Raise FileNotFoundError for a local folder that is not there, ValueError for an unknown name."""
        import open_clip

        source, name = name, resolve_name(name)
        if not name.startswith((LOCAL, "hf-hub:")) and name not in open_clip.list_models():
            raise ValueError(
                f"encoder.name={name}: open_clip has no such model; `local-dir:FOLDER` names one of your own"
            )
        model = open_clip.create_model(name, pretrained=pretrained, precision="fp32")
        visual: Any = model.visual
        visual.preprocess_cfg = open_clip.get_model_preprocess_cfg(model)
        return cls(visual.to(getattr(torch, dtype)), source, pretrained)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @property
    def image_size_px(self) -> int:
        size = self.visual.image_size
        return size if isinstance(size, int) else size[0]

    @property
    def pooled_width(self) -> int:
        return self.visual.output_dim

    @property
    def patch_width(self) -> int:
        return self.visual.conv1.out_channels

    def width(self, uses: Literal["pooled", "patches"]) -> int:
        """Width of the features that a head ``uses``: E or F."""
        return self.pooled_width if uses == "pooled" else self.patch_width

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor, uses: Literal["pooled", "patches"] = "pooled") -> Features:
        """Pixels in [-1, 1] at ``image_size_px`` → the features that the head ``uses``."""
        normalized = ((image_B3HW.float() + 1) / 2 - self.mean) / self.std
        return self._features(normalized.to(self.visual.conv1.weight.dtype), uses)

    @torch.no_grad()
    def blank(self, batch: int, uses: Literal["pooled", "patches"] = "pooled") -> Features:
        """What the published fine-grained weights take for "no image": a picture of zeros after normalisation."""
        weight = self.visual.conv1.weight
        zeros = torch.zeros(1, 3, self.image_size_px, self.image_size_px, device=weight.device, dtype=weight.dtype)
        features = self._features(zeros, uses)
        return Features(expand(features.pooled_BE, batch), expand(features.patches_BPF, batch))

    def _features(self, normalized_B3HW: Tensor, uses: str) -> Features:
        if uses == "pooled":
            return Features(pooled_BE=self.visual(normalized_B3HW))
        out = self.visual.forward_intermediates(
            normalized_B3HW, indices=[-2], output_extra_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        patches, extra = out["image_intermediates"][0], out["image_intermediates_prefix"][0]
        return Features(patches_BPF=torch.cat([extra, patches], dim=1))


def expand(features: Tensor | None, batch: int) -> Tensor | None:
    return None if features is None else features.expand(batch, *features.shape[1:])


def resolve_name(name: str) -> str:
    """Check a ``local-dir:`` folder and make it absolute, since open_clip resolves some paths late."""
    if not name.startswith(LOCAL):
        return name
    folder = Path(name.removeprefix(LOCAL))
    if not (folder / "open_clip_config.json").is_file():
        raise FileNotFoundError(f"encoder.name={name}: there is no open_clip_config.json in {folder}")
    return f"{LOCAL}{folder.resolve()}"


def read_pooled_width(name: str) -> int:
    """E from the configuration alone, so that a misfit is found before weights are read."""
    import open_clip

    name = resolve_name(name)
    if name.startswith(LOCAL):
        config = json.loads((Path(name.removeprefix(LOCAL)) / "open_clip_config.json").read_text())["model_cfg"]
    else:
        config = open_clip.get_model_config(name)
        if config is None:
            raise ValueError(
                f"encoder.name={name}: open_clip has no such model; `local-dir:FOLDER` names one of your own"
            )
    return config["embed_dim"]
