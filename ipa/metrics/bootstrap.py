"""Confidence intervals of means: percentile bootstrap over the items of a benchmark (Efron 1979)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ipa.errors import UserError


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def confidence_interval(
    value_B: Tensor, items: Tensor | Sequence[Hashable], level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Mean of the values with its confidence interval of this ``level``.

    Items are sampled with replacement, each with all its images, since images of one prompt with different seeds are
    not independent. The order does not matter. With a single item, low and high are nan.
    """
    items = items.tolist() if isinstance(items, Tensor) else items  # elements of a tensor are all different keys
    if len(value_B) != len(items) or len(value_B) == 0:
        raise UserError(f"expected an item for each value, and at least one: {len(value_B)} values, {len(items)} items")
    owner = {item: number for number, item in enumerate(sorted(set(items), key=repr))}
    owner_B = torch.tensor([owner[item] for item in items])
    sum_I = torch.zeros(len(owner), dtype=torch.float64).index_add_(0, owner_B, value_B.double().cpu())
    count_I = torch.bincount(owner_B).double()
    mean = float(sum_I.sum() / count_I.sum())
    if len(owner) == 1:
        return Interval(mean, torch.nan, torch.nan)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(owner), (len(owner),), generator=generator) for _ in range(resamples))
    mean_R = torch.stack([sum_I[draw].sum() / count_I[draw].sum() for draw in draws])
    low, high = mean_R.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)
