"""Intervals: known cases, items kept together, and coverage."""

import math

import pytest
import torch

from ipa.metrics.bootstrap import confidence_interval


def test_one_item_tells_nothing_of_the_scatter() -> None:
    interval = confidence_interval(torch.tensor([1.0, 2.0]), ["a", "a"])

    assert interval.mean == 1.5 and math.isnan(interval.low) and math.isnan(interval.high)
    assert confidence_interval(torch.full((6,), 0.25), "aabbcc") == (0.25, 0.25, 0.25)


def test_the_mean_is_over_pictures_and_the_order_does_not_matter() -> None:
    values, items = torch.randn(40), [f"{i // 3}" for i in range(40)]
    order = torch.randperm(40)

    assert confidence_interval(values, items).mean == pytest.approx(values.mean().item())
    again = confidence_interval(values[order], [items[i] for i in order])
    assert again == pytest.approx(confidence_interval(values, items))
    assert confidence_interval(values, items, seed=1) != confidence_interval(values, items)


def test_the_interval_of_a_large_sample_is_the_normal_one() -> None:
    values = torch.randn(2000)
    interval = confidence_interval(values, range(2000), level=0.9, resamples=4000)
    half = 1.645 * float(values.std()) / 2000**0.5

    assert interval.low == pytest.approx(interval.mean - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.1 * half)


def test_pictures_of_one_item_are_no_independent_sample() -> None:
    items = torch.randn(100)
    repeated = items.repeat_interleave(4)
    alone = confidence_interval(items, range(100))

    assert confidence_interval(repeated, [i // 4 for i in range(400)]) == pytest.approx(alone)
    assert confidence_interval(repeated, torch.arange(400) // 4) == pytest.approx(alone)
    apart = confidence_interval(repeated, range(400))
    assert apart.high - apart.low < 0.6 * (alone.high - alone.low)


@pytest.mark.parametrize(("count", "items"), [(0, []), (3, ["a", "b"])])
def test_every_value_needs_an_item(count: int, items: list[str]) -> None:
    with pytest.raises(ValueError, match="item for each value"):
        confidence_interval(torch.zeros(count), items)
