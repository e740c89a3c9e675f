"""LAION's aesthetic score: what people would give a picture between 1 and 10, by layers on top of CLIP ViT-L/14.

It asks neither prompt nor caption. The layers (Schuhmann 2022, sac+logos+ava1-l14-linearMSE) are all linear.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipa.errors import MissingWeights, UserError, brief
from ipa.metrics.clip import ClipScorer
from ipa.metrics.picture_metric import ItemMetric
from ipa.metrics.pixels import Pictures

ORIGINAL = "https://github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE.pth)"


class AestheticScore(ItemMetric):
    """aesthetic: the head's score of the unit-length CLIP embedding. The head fits one CLIP only."""

    head: Any

    def __init__(self, scorer: ClipScorer, head: nn.Sequential, **kwargs: Any) -> None:
        super().__init__(["aesthetic"], {"aesthetic": True}, network=scorer, **kwargs)
        object.__setattr__(self, "head", head.eval().requires_grad_(False))  # no part of the metric, as the network

    def measure(self, generated: Pictures, references: Pictures, captions: list[list[str]] | None) -> dict[str, Tensor]:
        assert self.network is not None
        embedding_BE = self.network.embed_images(generated).cpu()
        if embedding_BE.shape[1] != self.head[0].in_features:
            raise UserError(
                f"the aesthetic head reads embeddings of {self.head[0].in_features}, the scorer gives "
                f"{embedding_BE.shape[1]}; the published head needs ViT-L-14-quickgelu, openai"
            )
        return {"aesthetic": self.head(embedding_BE)[:, 0]}


def load_head(path: str) -> nn.Sequential:
    """The layers of a file, or of a hub id with the file behind it: owner/name/FILE.

    Raises MissingWeights when it cannot be had, ValueError for a file without such layers.
    """
    weights = torch.load(find_head(path), map_location="cpu", weights_only=True)
    names = sorted((name for name in weights if re.fullmatch(r"layers\.\d+\.weight", name)), key=layer_number)
    if not names:
        raise UserError(f"aesthetic head path={path}: no layers.N.weight in it, but {', '.join(list(weights)[:3])} …")
    head = nn.Sequential(*(nn.Linear(*reversed(weights[name].shape)) for name in names))
    for layer, name in zip(head, names, strict=True):
        layer.load_state_dict({"weight": weights[name], "bias": weights[name.replace("weight", "bias")]})
    return head


def layer_number(name: str) -> int:
    return int(name.split(".")[1])


def find_head(path: str) -> Path:
    from huggingface_hub import hf_hub_download

    if Path(path).is_file():
        return Path(path)
    owner, _, rest = path.partition("/")
    repository, _, file = rest.partition("/")
    try:
        if not file or path.startswith((".", "/", "~")):
            raise FileNotFoundError("There is no such file.")
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except OSError as error:
        raise MissingWeights(
            f"aesthetic head path={path}: {brief(error)} Download it from {ORIGINAL} and give the file as path"
        ) from error
