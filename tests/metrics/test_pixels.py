"""Images are fitted within their range, and known again by their pixels."""

from __future__ import annotations

import pytest
import torch
from metric_samples import images

from ipa.metrics.image_metric import fit_square, image_keys


@pytest.mark.parametrize("size", [(20, 32), (32, 20), (8, 8), (64, 64)])
def test_fitted_pictures_stay_in_range(size: tuple[int, int]) -> None:
    black_and_white = torch.rand(2, 3, *size).round() * 2 - 1
    fitted = fit_square(black_and_white, 16)

    assert fitted.shape == (2, 3, 16, 16)
    assert -1 <= fitted.min() < -0.5 and 0.5 < fitted.max() <= 1


def test_the_centre_is_cut_out_of_the_fitted_square() -> None:
    large = images(0, size_px=30)

    torch.testing.assert_close(fit_square(large, 20, 16), fit_square(large, 20)[..., 2:18, 2:18])
    assert fit_square(large, 30, 16).equal(large[..., 7:23, 7:23])


def test_keys_are_equal_for_equal_pictures_only() -> None:
    given = images(0)
    changed = given.clone()
    changed[:, 0, 3, 5] = -changed[:, 0, 3, 5].sign()
    reshaped = given.reshape(6, 3, 12, 48)
    keys = [image_keys(some) for some in (given, changed, reshaped, list(given.roll(1, 0)))]

    assert len(torch.cat(keys[:3]).unique()) == 18
    assert keys[3].equal(keys[0].roll(1))
    assert image_keys(given + 1e-4).equal(keys[0])  # as after a detour over 256 levels
