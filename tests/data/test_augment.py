import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from ipa.data.addresses import Address
from ipa.data.images.augment import Augmentation
from ipa.data.images.transforms import FITS, Opened, fit_reference


def at(index: int, epoch: int = 0) -> Address:
    return Address(0, epoch, "train", "00000.tar", index)


def ramps(width: int, height: int) -> Opened:
    """Red tells the place across, green the place down; blue is 100."""
    red, green = Image.linear_gradient("L").rotate(90), Image.linear_gradient("L")
    picture = Image.merge("RGB", (red, green, Image.new("L", (256, 256), 100)))
    return Opened.of(picture.resize((width, height)))


def augmented(augment: Augmentation, picture: Opened, size_px: int, address: Address, fit: str = "crop") -> Tensor:
    shown = augment.crop(picture, augment.need(size_px), address)
    return augment.change(fit_reference(shown, size_px, fit), address)


@pytest.mark.parametrize("fit", FITS)
def test_by_default_nothing_changes(fit: str) -> None:
    picture = ramps(90, 60)
    plain = Augmentation()

    assert torch.equal(augmented(plain, picture, 24, at(0), fit), fit_reference(picture, 24, fit))
    assert plain.need(24) == (24, 24)


def test_draws_belong_to_the_sample() -> None:
    picture, augment = ramps(90, 60), Augmentation(area=0.5, flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2)
    made = [augmented(augment, picture, 16, at(i)) for i in range(8)]

    assert all(torch.equal(made[i], augmented(augment, picture, 16, at(i))) for i in range(8))
    assert len({tuple(each.flatten().tolist()) for each in made}) == 8
    assert not torch.equal(made[0], augmented(augment, picture, 16, at(0, epoch=1)))
    assert {(each.shape, each.dtype) for each in made} == {((3, 16, 16), torch.uint8)}


@pytest.mark.parametrize("size", [(400, 400), (600, 200), (120, 500)])
@pytest.mark.parametrize("area", [0.3, 0.8])
def test_parts_have_at_least_their_share_and_about_the_pictures_proportions(size: tuple[int, int], area: float) -> None:
    picture, augment = ramps(*size), Augmentation(area=area)
    parts = [augment.crop(picture, (1, 1), at(i)) for i in range(200)]
    shares = [part.size[0] * part.size[1] / (size[0] * size[1]) for part in parts]
    stretches = [part.size[0] / part.size[1] / (size[0] / size[1]) for part in parts]
    lefts = [int(part.pixels_3HW[0].min()) for part in parts]

    assert min(shares) > area - 0.01 and max(shares) <= 1
    assert sum(shares) / len(shares) == pytest.approx((1 + area) / 2, abs=0.05)
    assert 0.74 < min(stretches) < 0.97 and 1.03 < max(stretches) < 1.35
    assert min(lefts) < 5 and len(set(lefts)) > 10  # all over the picture
    assert all(part.pixels_3HW.shape[1:] == (part.size[1], part.size[0]) for part in parts)


def test_the_smallest_part_still_has_the_pixels_that_are_needed() -> None:
    augment = Augmentation(area=0.25)
    picture = ramps(*augment.need(64))

    assert augment.need(64)[0] in range(128, 160)
    assert all(min(augment.crop(picture, (1, 1), at(i)).size) >= 63 for i in range(300))


def test_parts_come_from_the_larger_picture_when_the_reduced_one_has_too_few_pixels() -> None:
    picture, augment = ramps(400, 400), Augmentation(area=0.25)
    small = picture.shrunk((100, 100))

    assert torch.equal(augmented(augment, small, 80, at(0)), augmented(augment, picture, 80, at(0)))
    assert augment.crop(small, (20, 20), at(0)).size[0] <= 100


def test_flips_mirror() -> None:
    picture = ramps(64, 64)
    plain, mirrored = (augmented(Augmentation(flip=flip), picture, 16, at(0)) for flip in (0, 1))
    flipped = [not torch.equal(augmented(Augmentation(flip=0.3), picture, 16, at(i)), plain) for i in range(300)]

    assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)
    assert sum(flipped) == pytest.approx(90, abs=30)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_change_as_torchvisions_do(name: str) -> None:
    picture, candidates = ramps(64, 64), torch.linspace(0.6, 1.4, 401)
    plain, adjust = fit_reference(picture, 16), getattr(functional, f"adjust_{name}")
    adjusted = torch.stack([adjust(plain, float(factor)) for factor in candidates]).float()
    factors = []
    for i in range(40):
        ours = augmented(Augmentation(**{name: 0.4}), picture, 16, at(i))
        errors = (adjusted - ours).abs().flatten(1).mean(1)
        assert errors.min() < 1
        factors.append(float(candidates[errors.argmin()]))

    assert 0.6 <= min(factors) < 0.8 and 1.2 < max(factors) <= 1.4
