"""Edge overlap on cases whose answer is known."""

import pytest
import torch
from torch import Tensor

from ipa.metrics.edges import edge_overlap, edges_at_one_size, find_edges


def square(left: int, size_px: int = 64, colour: float = 1.0) -> Tensor:
    """A square of a third of the edge on black."""
    pixels = torch.full((1, 3, size_px, size_px), -1.0)
    third = size_px // 3
    pixels[..., third : 2 * third, left : left + third] = colour
    return pixels


def test_edges_are_where_any_channel_changes_by_that_much() -> None:
    blue = torch.full((1, 3, 8, 8), -1.0)
    blue[:, 2, :, 4:] = 1
    edges = find_edges(blue)

    assert edges[0, :, 3:5].all() and edges.sum() == 16
    assert not find_edges(0.1 * blue).any()


def test_a_pixel_beside_is_found_and_colours_do_not_matter() -> None:
    def overlap(one: Tensor, other: Tensor) -> float:
        return float(edge_overlap(edges_at_one_size(one), edges_at_one_size(other)))

    assert overlap(square(20), square(21, colour=0.3)) == pytest.approx(1)
    assert overlap(square(20), square(20, size_px=64).flip(1)) == pytest.approx(1)
    assert overlap(square(0), square(40)) == 0 < overlap(square(15), square(20)) < 0.8
    assert overlap(square(60, 192), square(20)) > 0.9  # whatever the size
    nothing = torch.zeros(1, 3, 64, 64)
    assert (overlap(nothing, nothing), overlap(nothing, square(20))) == (1, 0)


def test_precision_and_recall_count_alike() -> None:
    one, other = torch.zeros(1, 9, 9, dtype=torch.bool), torch.zeros(1, 9, 9, dtype=torch.bool)
    one[0, 0, 0] = True
    other[0, 0, 0] = other[0, 8, 8] = True

    assert edge_overlap(one, other).item() == edge_overlap(other, one).item() == pytest.approx(2 / 3)
