"""Distances between the set of generated images and the set of references, in the features of a network.

* fid: |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of two normal distributions (Heusel et al. 2017). Its bias shrinks with
  the number of images: compare sets of equal size, with thousands of images for 2048 features.
* kid: unbiased squared maximum mean discrepancy under (x · y / E + 1)³, usable for small sets (Bińkowski et al. 2018):
  the mean over random subsets, and their standard deviation as kid_std.

Both come from torchmetrics. Only with Inception's features are they called fid and kid; with another network give them
another name, such as fid_judge. Repeated references, one per seed, count once; else KID would compare equal images.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ipa.errors import UserError
from ipa.metrics.image_metric import ImageMetric, Images, first_of_each, image_keys
from ipa.metrics.networks import ImageNetwork

ROWS = ("generated_BE", "references_BE", "reference_keys_B")


class DistributionMetric(ImageMetric):
    """``compare`` compares the two sets; single images have no values."""

    def __init__(self, network: ImageNetwork, higher: dict[str, bool], **kwargs: Any) -> None:
        super().__init__(ROWS, higher, network, **kwargs)

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        features = (self.network.embed_images(generated), self.network.embed_images(references))
        return dict(zip(ROWS, (*features, image_keys(references)), strict=True))

    def compute(self) -> dict[str, Tensor]:
        """Name → value; raises UserError for fewer than two images or references."""
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

    def __init__(self, network: ImageNetwork, name: str = "fid", **kwargs: Any) -> None:
        super().__init__(network, {name: False}, **kwargs)
        self.name = name

    def compare(self, generated_BE: Tensor, references_BE: Tensor) -> dict[str, Tensor]:
        features: Any = nn.Identity()
        features.num_features = generated_BE.shape[1]  # or torchmetrics would run an image through it to find out
        distance = FrechetInceptionDistance(features, sync_on_compute=False)
        distance.update(references_BE, real=True)
        distance.update(generated_BE, real=False)
        return {self.name: distance.compute().float()}


class KernelDistance(DistributionMetric):
    """KID under ``name``, over ``subsets`` of at most ``subset_size`` images, drawn with ``seed``."""

    def __init__(
        self,
        network: ImageNetwork,
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
            warnings.simplefilter("ignore")  # a warning about the memory for features, which we hold anyway
            torch.manual_seed(self.seed)
            distance = KernelInceptionDistance(nn.Identity(), self.subsets, size, sync_on_compute=False)
            distance.update(references_BE, real=True)
            distance.update(generated_BE, real=False)
            mean, std = distance.compute()
        return {self.name: mean.float(), f"{self.name}_std": std.float()}
