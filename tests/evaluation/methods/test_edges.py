import math

import pytest
import torch
from torch import Tensor

from ipa.evaluation.methods.edges import canny, connected, gradient


def picture(level_HW: Tensor) -> Tensor:
    return level_HW.to(torch.uint8).expand(3, -1, -1)


def step(jump: int) -> Tensor:
    """A step down the middle of 12 × 12 pixels."""
    return picture(jump * (torch.arange(12) >= 6).expand(12, 12))


@pytest.mark.parametrize("turned", [False, True])
def test_a_step_gives_a_line_one_pixel_wide(turned: bool) -> None:
    image_3HW = step(90)
    edges_HW = canny(image_3HW.mT if turned else image_3HW)

    expected_HW = (torch.arange(12) == 6).float().expand(12, 12)
    assert torch.equal(edges_HW.T if turned else edges_HW, expected_HW)


def test_a_disc_gives_a_thin_closed_ring() -> None:
    y_HW, x_HW = torch.meshgrid(torch.arange(40) - 20, torch.arange(40) - 20, indexing="ij")
    radius_HW = torch.sqrt(x_HW**2.0 + y_HW**2)
    edges_HW = canny(picture(200 * (12.5 - radius_HW).clamp(0, 1)))

    assert (radius_HW[edges_HW > 0] - 12).abs().max() < 1.5
    assert 0.8 * 2 * math.pi * 12 < edges_HW.sum() < 1.5 * 2 * math.pi * 12
    outside = torch.zeros(40, 40, dtype=torch.bool)
    outside[0, 0] = True
    for _ in range(80):  # what is reached over sides alone, which no closed line lets through
        outside |= (outside.roll(1, 0) | outside.roll(-1, 0) | outside.roll(1, 1) | outside.roll(-1, 1)) & (
            edges_HW == 0
        )
    assert not outside[20, 20]


def test_thresholds_are_in_opencvs_units() -> None:
    """A step of ``n`` levels has a Sobel sum of 4 n."""
    assert canny(step(51), high=200, low=0).any() and not canny(step(51), high=208, low=0).any()
    assert not canny(step(51), high=0, low=208).any()  # exchanged
    assert not canny(torch.full((3, 9, 7), 130, dtype=torch.uint8), low=0, high=0).any()  # a plain picture


def test_weak_edges_stay_where_strong_ones_lead_to_them() -> None:
    weak_HW = torch.tensor([[1, 0, 0, 0, 1], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0]]).bool()
    strong_HW = torch.zeros_like(weak_HW)
    strong_HW[0, 0] = True

    found_HW = connected(strong_HW, weak_HW)
    assert found_HW.int().tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert not connected(torch.zeros_like(weak_HW), weak_HW).any()


def test_the_four_directions_are_told_apart() -> None:
    y_HW, x_HW = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    for direction, slope_HW in enumerate([x_HW, x_HW + y_HW, y_HW, y_HW - x_HW]):
        for sign in (1, -1):
            size_HW, found_HW = gradient(sign * slope_HW)
            assert (found_HW[1:-1, 1:-1] == direction).all() and (size_HW[1:-1, 1:-1] >= 8).all()
