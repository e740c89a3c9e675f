"""How alike generated pictures and their image prompts are to a network of one's choice."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ipa.metrics.networks import PictureNetwork
from ipa.metrics.picture_metric import ItemMetric
from ipa.metrics.pixels import Pictures


class ImageSimilarity(ItemMetric):
    """Cosine of the network's unit-length features of picture and prompt, told under ``name``.

    Many systems condition on the CLIP that CLIP-I asks. A network that conditions nothing is the check on that.
    """

    def __init__(self, network: PictureNetwork, name: str, higher: bool = True, **kwargs: Any) -> None:
        super().__init__([name], {name: higher}, network, **kwargs)
        self.name = name

    def measure(self, generated: Pictures, references: Pictures, captions: list[list[str]] | None) -> dict[str, Tensor]:
        assert self.network is not None
        generated_BE, references_BE = (self.network.embed_images(pictures) for pictures in (generated, references))
        return {self.name: (generated_BE * references_BE).sum(1)}


class ImageDistance(ImageSimilarity):
    """One minus the cosine, as DreamSim is told; lower is better."""

    def __init__(self, network: PictureNetwork, name: str, **kwargs: Any) -> None:
        super().__init__(network, name, higher=False, **kwargs)

    def values(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: 1 - rows[self.name]}
