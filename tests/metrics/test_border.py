"""Border colours on cases whose answer is known."""

import pytest
import torch
import torch.nn.functional as F
from metric_samples import images
from torch import Tensor

from ipa.metrics.border import border_distance, rgb_to_lab
from ipa.types import to_unit_range


def plain(*colour: float) -> Tensor:
    """One image of one colour, given in 0 … 255."""
    return to_unit_range(torch.tensor(colour)[None, :, None, None].expand(1, 3, 16, 16))


def framed(inside: Tensor, colour: float) -> Tensor:
    """The images with a frame one sixteenth of the edge wide."""
    out = torch.full_like(inside, colour)
    out[..., 1:-1, 1:-1] = inside[..., 1:-1, 1:-1]
    return out


def test_black_is_100_away_from_white() -> None:
    black, white, grey = plain(0, 0, 0), plain(255, 255, 255), plain(119, 119, 119)

    assert border_distance(black, white).item() == pytest.approx(100, abs=1e-3)
    assert border_distance(grey, black).item() == pytest.approx(50.03, abs=0.01)  # L of sRGB 119
    assert border_distance(torch.cat([black, white]), torch.cat([black, black])).tolist() == pytest.approx(
        [0, 100], abs=1e-3
    )


def test_only_the_median_colour_of_the_border_counts() -> None:
    """Whatever is inside or touches the border here and there, at any size."""
    inside, touching = images(1, size_px=16), plain(255, 255, 255).clone()
    touching[..., :7] = -1  # less than half of the frame

    assert border_distance(framed(inside, 0.3), framed(images(2, size_px=16), 0.3)).tolist() == [0] * 6
    assert border_distance(framed(inside, 0.3), framed(inside, 0.4)).min() > 1
    assert border_distance(touching, plain(255, 255, 255)).item() == 0
    assert border_distance(plain(200, 30, 60), F.interpolate(plain(200, 30, 60), (40, 24))).item() == 0


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((8, 8, 8), (2.19, 0.0, 0.0)),
    ],
)
def test_lab_of_well_known_colours(rgb: tuple[int, ...], lab: tuple[float, ...]) -> None:
    assert rgb_to_lab(torch.tensor([rgb]) / 255)[0].tolist() == pytest.approx(lab, abs=0.02)
