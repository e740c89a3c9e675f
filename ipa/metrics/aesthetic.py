"""LAION's aesthetic score from 1 to 10: linear layers on CLIP ViT-L/14 (Schuhmann 2022, improved-aesthetic-predictor).

Prompt and caption are not used.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ipa.errors import UserError
from ipa.metrics.clip import ClipScorer
from ipa.metrics.image_metric import Images, ItemMetric
from ipa.metrics.networks import find_file


class AestheticScore(ItemMetric):
    """aesthetic: the head's score of the unit-length CLIP embedding; a head fits one CLIP only."""

    network: ClipScorer
    head: nn.Sequential

    def __init__(self, scorer: ClipScorer, head: nn.Sequential, **kwargs: Any) -> None:
        super().__init__(["aesthetic"], {"aesthetic": True}, network=scorer, **kwargs)
        object.__setattr__(self, "head", head.eval().requires_grad_(False))  # as the network

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        embedding_BE = self.network.embed_images(generated)
        expected = self.head[0].in_features
        if embedding_BE.shape[1] != expected:
            raise UserError(
                f"the aesthetic head reads embeddings of width {expected}, the scorer gives {embedding_BE.shape[1]}; "
                "the published head needs ViT-L-14-quickgelu, openai"
            )
        return {"aesthetic": self.head.to(embedding_BE.device)(embedding_BE)[:, 0]}


def load_head(path: str) -> nn.Sequential:
    """The layers from a file, or from the hub: owner/name/FILE. Raises MissingWeights, UserError without layers."""
    weights = torch.load(find_file(path, "aesthetic head path"), map_location="cpu", weights_only=True)
    names = [name for name in weights if re.fullmatch(r"layers\.\d+\.weight", name)]
    names.sort(key=lambda name: int(name.split(".")[1]))
    if not names:
        raise UserError(f"aesthetic head path={path}: no layers.N.weight in it, but {', '.join(list(weights)[:3])} …")
    head = nn.Sequential(*(nn.Linear(*reversed(weights[name].shape)) for name in names))
    for layer, name in zip(head, names, strict=True):
        layer.load_state_dict({"weight": weights[name], "bias": weights[name.replace("weight", "bias")]})
    return head
