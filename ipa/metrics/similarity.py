"""Similarity of generated images to their image prompts, in the features of any network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ipa.metrics.image_metric import ItemMetric
from ipa.metrics.networks import ImageNetwork
from ipa.metrics.pixels import Images


class ImageSimilarity(ItemMetric):
    """Cosine of the network's unit-length features of image and prompt, reported as ``name``.

    Many systems condition on the CLIP that CLIP-I uses; a network that none of them reads is an independent check.
    """

    def __init__(self, network: ImageNetwork, name: str, higher: bool = True, **kwargs: Any) -> None:
        super().__init__([name], {name: higher}, network, **kwargs)
        self.name = name

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        generated_BE, references_BE = (self.network.embed_images(images) for images in (generated, references))
        return {self.name: (generated_BE * references_BE).sum(1)}


class ImageDistance(ImageSimilarity):
    """One minus the cosine, as DreamSim is reported; lower is better."""

    def __init__(self, network: ImageNetwork, name: str, **kwargs: Any) -> None:
        super().__init__(network, name, higher=False, **kwargs)

    def values(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: 1 - rows[self.name]}
