"""FID and KID against their definitions."""

import numpy as np
import pytest
import torch
from metric_samples import images, told
from scipy.linalg import sqrtm
from torch import Tensor

from ipa.metrics.clip import ClipScorer
from ipa.metrics.distributions import FrechetDistance, KernelDistance


def frechet(one_BE: Tensor, other_BE: Tensor) -> float:
    one, other = one_BE.double().numpy(), other_BE.double().numpy()
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    return float(np.square(one.mean(0) - other.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


def kernel(one_BE: Tensor, other_BE: Tensor) -> float:
    """The unbiased estimate over all pairs."""
    one, other = one_BE.double(), other_BE.double()

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [(k(x, x).sum() - k(x, x).trace()) / (len(x) * (len(x) - 1)) for x in (one, other)]
    return float(within[0] + within[1] - 2 * k(one, other).mean())


def tinted(seed: int, count: int) -> Tensor:
    """Faint noise on dark grounds: another distribution than plain noise."""
    return 0.3 * images(seed, count) + torch.linspace(-0.7, -0.3, count)[:, None, None, None]


def test_frechet_distance_is_the_defined_one(scorer: ClipScorer) -> None:
    generated, references, metric = tinted(1, 40), images(2, 30), FrechetDistance(scorer, "fid_judge")
    metric.update(generated[:25], references[:25])
    metric.update(generated[25:30], references[25:])
    features = scorer.embed_images(generated[:30]), scorer.embed_images(references)

    assert told(metric) == pytest.approx({"fid_judge": frechet(*features)}, abs=1e-5)
    assert told(metric)["fid_judge"] > 0.01


def test_kernel_distance_is_the_defined_one_where_all_are_taken(scorer: ClipScorer) -> None:
    generated, references, metric = tinted(1, 20), images(2, 20), KernelDistance(scorer, "kid_judge", subsets=3)
    metric.update(generated, references)
    expected = kernel(scorer.embed_images(generated), scorer.embed_images(references))

    assert told(metric) == pytest.approx({"kid_judge": expected, "kid_judge_std": 0}, rel=1e-4, abs=1e-9)
    assert expected > 1e-3


def test_subsets_scatter_around_the_whole_and_come_from_their_seed_alone(scorer: ClipScorer) -> None:
    def subsets(seed: int) -> dict[str, float]:
        metric = KernelDistance(scorer, subsets=60, subset_size=10, seed=seed)
        metric.update(tinted(1, 20), images(2, 20))
        return told(metric)

    before = torch.get_rng_state()
    first = subsets(0)
    whole = kernel(scorer.embed_images(tinted(1, 20)), scorer.embed_images(images(2, 20)))

    assert torch.get_rng_state().equal(before)
    assert subsets(0) == first != subsets(1)
    assert first["kid"] == pytest.approx(whole, abs=first["kid_std"]) and first["kid_std"] > 0


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
def test_references_count_once(scorer: ClipScorer, kind: type[FrechetDistance] | type[KernelDistance]) -> None:
    generated, references = tinted(1, 16), images(2, 8)
    metric = kind(scorer, "distance")
    metric.update(generated, references.repeat(2, 1, 1, 1))
    features = scorer.embed_images(generated), scorer.embed_images(references)

    if kind is FrechetDistance:
        assert told(metric)["distance"] == pytest.approx(frechet(*features), abs=1e-5)
    else:  # of sixteen and eight it takes eight and eight, so the whole is but near
        assert told(metric)["distance"] == pytest.approx(kernel(*features), abs=2 * told(metric)["distance_std"])


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
def test_a_set_is_near_itself(scorer: ClipScorer, kind: type[FrechetDistance] | type[KernelDistance]) -> None:
    metric, other = kind(scorer, "distance"), kind(scorer, "distance")
    metric.update(images(1, 20), images(1, 20))
    other.update(tinted(1, 20), images(1, 20))

    assert told(metric)["distance"] < 1e-5 < told(other)["distance"]
    lone = kind(scorer, "distance")
    lone.update(images(1, 2), images(1, 1).repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="distance compares sets of two or more, not 2 with 1"):
        lone.compute()
