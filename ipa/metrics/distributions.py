"""How far the generated pictures as a set are from the references as a set, in the features of a network.

* fid: |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of two normal distributions (Heusel et al. 2017). Its bias shrinks with
  the number of pictures: compare sets of the same size, thousands where there are 2048 features.
* kid: squared maximum mean discrepancy under (x · y / E + 1)³, without bias, so fit for small sets (Bińkowski et al.
  2018): the mean over random subsets, and kid_std their scatter.

Both come from torchmetrics. They are called fid and kid over Inception's features only; over another network's they
need names of their own, such as fid_judge. References that come several times, one for each seed, count once: KID would
else take a picture's likeness to itself for likeness of the set.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ipa.errors import UserError
from ipa.metrics.networks import PictureNetwork
from ipa.metrics.picture_metric import PictureMetric, first_of_each
from ipa.metrics.pixels import Pictures, picture_keys

ROWS = ("generated_BE", "references_BE", "reference_keys_B")


class DistributionMetric(PictureMetric):
    """Compares the sets in ``compare``; there are no values of single pictures."""

    def __init__(self, network: PictureNetwork, higher: dict[str, bool], **kwargs: Any) -> None:
        super().__init__(ROWS, higher, network, **kwargs)

    def measure(self, generated: Pictures, references: Pictures, captions: list[list[str]] | None) -> dict[str, Tensor]:
        assert self.network is not None
        features = (self.network.embed_images(generated), self.network.embed_images(references))
        return dict(zip(ROWS, (*features, picture_keys(references)), strict=True))

    def compute(self) -> dict[str, Tensor]:
        """Name → value. Raises UserError for fewer than two pictures or references."""
        generated_BE, references_BE, keys_B = (self.rows()[name] for name in ROWS)
        references_BE = references_BE[first_of_each(keys_B)]
        sizes = (len(generated_BE), len(references_BE))
        if min(sizes) < 2:
            raise UserError(f"{next(iter(self.higher))} compares sets of two or more, not {sizes[0]} with {sizes[1]}")
        return self.compare(generated_BE.double(), references_BE.double())

    def compare(self, generated_BE: Tensor, references_BE: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class FrechetDistance(DistributionMetric):
    """FID under ``name``."""

    def __init__(self, network: PictureNetwork, name: str = "fid", **kwargs: Any) -> None:
        super().__init__(network, {name: False}, **kwargs)
        self.name = name

    def compare(self, generated_BE: Tensor, references_BE: Tensor) -> dict[str, Tensor]:
        features: Any = nn.Identity()
        features.num_features = generated_BE.shape[1]  # else torchmetrics would run a picture through it
        distance = FrechetInceptionDistance(features, sync_on_compute=False)
        distance.update(references_BE, real=True)
        distance.update(generated_BE, real=False)
        return {self.name: distance.compute().float()}


class KernelDistance(DistributionMetric):
    """KID under ``name``, over ``subsets`` of at most ``subset_size`` pictures, drawn with ``seed``.

    The subsets are the same over any number of processes when the pictures are numbered.
    """

    def __init__(
        self,
        network: PictureNetwork,
        name: str = "kid",
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, {name: False, f"{name}_std": False}, **kwargs)
        self.name, self.subsets, self.subset_size, self.seed = name, subsets, subset_size, seed

    def compare(self, generated_BE: Tensor, references_BE: Tensor) -> dict[str, Tensor]:
        size = min(self.subset_size, len(generated_BE), len(references_BE))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # it warns of the memory for features, which are here already
            torch.manual_seed(self.seed)
            distance = KernelInceptionDistance(nn.Identity(), self.subsets, size, sync_on_compute=False)
            distance.update(references_BE, real=True)
            distance.update(generated_BE, real=False)
            mean, std = distance.compute()
        return {self.name: mean.float(), f"{self.name}_std": std.float()}
