"""The Swin backbone against torchvision's, which is another implementation with other names."""

import re

import pytest
import torch
from torch import Tensor
from torchvision.models.swin_transformer import SwinTransformer

from ipa.evaluation.methods.seecoder_swin import (
    SwinBackbone,
    cut_windows,
    index_distances,
    join_windows,
    mask_rolled,
)

WIDTH, DEPTHS, HEADS, WINDOW = 8, [2, 2, 2], [1, 2, 4], 4
RENAMED = [
    (r"patch_embed\.proj", "features.0.0"),
    (r"patch_embed\.norm", "features.0.2"),
    (r"mlp\.fc1", "mlp.0"),
    (r"mlp\.fc2", "mlp.3"),
]


def theirs_like(ours: SwinBackbone) -> SwinTransformer:
    """torchvision has the stages and the mergings between them in one list, and one norm at the end."""
    theirs = SwinTransformer(
        [4, 4], WIDTH, DEPTHS, HEADS, [WINDOW, WINDOW], stochastic_depth_prob=0.0, num_classes=1
    ).eval()
    state = theirs.state_dict()
    for name, weight in ours.state_dict().items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        name = re.sub(r"layers\.(\d+)\.blocks", lambda match: f"features.{1 + 2 * int(match[1])}", name)
        name = re.sub(r"layers\.(\d+)\.downsample", lambda match: f"features.{2 + 2 * int(match[1])}", name)
        if not re.match(r"norm\d", name):
            assert name in state, name
            state[name] = weight.flatten() if name.endswith("relative_position_index") else weight
    theirs.load_state_dict(state)
    return theirs


@pytest.fixture
def ours() -> SwinBackbone:
    backbone = SwinBackbone(WIDTH, DEPTHS, HEADS, WINDOW).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return backbone


@pytest.mark.parametrize("size", [(128, 128), (120, 88), (84, 136)])
@torch.no_grad()
def test_every_stage_is_torchvisions(ours: SwinBackbone, size: tuple[int, int]) -> None:
    """Also where the window does not divide a map, and where a map has an odd side."""
    theirs = theirs_like(ours)
    image = torch.randn(2, 3, *size)
    maps, x = ours(image), theirs.features[0](image)
    assert len(maps) == len(DEPTHS)
    for i, found in enumerate(maps):
        x = theirs.features[1 + 2 * i](x)
        expected = getattr(ours, f"norm{i}")(x).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        x = theirs.features[2 + 2 * i](x) if i + 1 < len(maps) else x


def test_windows_are_cut_and_joined_again() -> None:
    x_BHWC = torch.randn(2, 6, 9, 5)
    windows = cut_windows(x_BHWC, 3)
    assert windows.shape == (2, 6, 9, 5)
    assert torch.equal(windows[0, 1].unflatten(0, (3, 3)), x_BHWC[0, :3, 3:6])
    assert torch.equal(join_windows(windows, x_BHWC.shape[1:3], 3), x_BHWC)


def test_distances_have_one_row_each() -> None:
    index_KK = index_distances(3)
    assert index_KK.shape == (9, 9) and sorted(index_KK.unique().tolist()) == list(range(25))
    assert len(index_KK.diagonal().unique()) == 1


def test_what_rolling_brought_together_is_kept_apart() -> None:
    """In a map whose cells know where they came from: unmasked pairs were less than a window apart."""
    side, window, shift = 8, 4, 2

    def rolled(place: Tensor) -> Tensor:
        return cut_windows(place.roll((-shift, -shift), (0, 1))[None, :, :, None], window)[0, :, :, 0]

    rows, columns = (rolled(place) for place in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    far_NKK = torch.zeros(4, 16, 16, dtype=torch.bool)
    for place in (rows, columns):
        far_NKK |= (place[:, :, None] - place[:, None]).abs() >= window
    assert torch.equal(mask_rolled(torch.Size([side, side]), window, shift) < 0, far_NKK)


def test_a_backbone_is_made_like_its_weights(ours: SwinBackbone) -> None:
    made = SwinBackbone.like(ours.state_dict())
    made.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 40, 40)
    assert all(torch.equal(a, b) for a, b in zip(made.eval()(image), ours(image), strict=True))
