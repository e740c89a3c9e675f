"""Masks move with their pictures, and what does not fit is rejected by name."""

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from tars import Members, saved, write_tar

from ipa.data.addresses import Address
from ipa.data.images.augment import Augmentation
from ipa.data.images.preparation import ImagePreparation, Sample
from ipa.data.images.transforms import PAD_COLOUR
from ipa.data.records import Record
from ipa.data.rejects import Rejected
from ipa.data.shards.source import ShardSource

CELLS_PX = 4  # edge of a latent cell


def blob(size: tuple[int, int]) -> Image.Image:
    """A grey mask with an ellipse off its centre."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    inside = ((x - 0.35) / 0.3) ** 2 + ((y - 0.6) / 0.25) ** 2 < 1
    return Image.fromarray((255 * inside).astype(np.uint8))


def sample_of(size: tuple[int, int], alpha: bool = False, mask: Image.Image | None = None) -> Members:
    """A picture that is red inside its mask and blue outside; with ``alpha`` its mask is its opacity."""
    inside = mask or blob(size)
    inside = inside.resize(size)
    picture = Image.composite(Image.new("RGB", size, "red"), Image.new("RGB", size, "blue"), inside)
    if alpha:
        picture.putalpha(inside)
    return [("a.txt", b"a thing"), ("a.png", saved(picture, "PNG")), ("a.mask.png", saved(mask or inside, "PNG"))]


def read(folder: Path, members: Members, **options: Any) -> list[Record | Rejected]:
    return list(
        ShardSource.of("train", shards=write_tar(folder / "0.tar", members), **options).read(str(folder / "0.tar"))
    )


def prepared(folder: Path, members: Members, index: int = 0, target: Any = None, **options: Any) -> Sample:
    images = {name: options.pop(name) for name in list(options) if name in ImagePreparation.__dataclass_fields__}
    (record,) = read(folder, members, **options)
    assert isinstance(record, Record)
    preparation = ImagePreparation(32, 24, (4, 32 // CELLS_PX, 32 // CELLS_PX), **images)
    return preparation.sample(record, Address(0, 0, "train", "0.tar", index), target)


def assert_together(sample: Sample) -> tuple[int, int]:
    """The cells that are inside show red; returns the darkest and the brightest cell."""
    assert sample.loss_mask_1HW is not None
    red = torch.nn.functional.avg_pool2d(sample.image_3HW[:1].float(), CELLS_PX)
    mask = sample.loss_mask_1HW.float()
    assert mask.shape == red.shape and (mask - red).abs().mean() < 6
    return int(mask.min()), int(mask.max())


@pytest.mark.parametrize("target", [(32, 32), (48, 24), (24, 40)])
@pytest.mark.parametrize("size", [(90, 60), (50, 130), (400, 100), (37, 41)])
def test_crops_and_buckets_move_the_mask_with_the_picture(
    size: tuple[int, int], target: tuple[int, int], tmp_path: Path
) -> None:
    seen = set[int]()
    for index in range(4):
        sample = prepared(tmp_path, sample_of(size), index, target, loss_mask="mask.png", crop="random")
        assert sample.image_3HW.shape[1:] == target[::-1]
        seen |= {*assert_together(sample)}
    assert min(seen) == 0 and max(seen) == 255


def test_opacity_is_a_mask_and_opaque_pictures_are_all_inside(tmp_path: Path) -> None:
    transparent = sample_of((60, 50), alpha=True)
    member = prepared(tmp_path, transparent, loss_mask="mask.png").loss_mask_1HW
    alpha = prepared(tmp_path, transparent, loss_mask="alpha").loss_mask_1HW
    opaque = prepared(tmp_path, sample_of((60, 50)), loss_mask="alpha").loss_mask_1HW

    assert member is not None and alpha is not None and opaque is not None
    assert torch.equal(alpha, member) and 0 < alpha.float().mean() < 100
    assert torch.equal(opaque, torch.full_like(alpha, 255))


def test_a_batch_of_samples_with_and_without_masks(tmp_path: Path) -> None:
    with_mask = prepared(tmp_path, sample_of((60, 50)), loss_mask="mask.png")
    preparation = ImagePreparation(32, 24, (4, 8, 8))
    mixed = preparation.batch([with_mask, replace(with_mask, loss_mask_1HW=None)], [])
    without = preparation.batch([replace(with_mask, loss_mask_1HW=None)], [])

    assert mixed.loss_mask_B1HW is not None and mixed.loss_mask_B1HW.shape == (2, 1, 8, 8)
    assert mixed.loss_mask_B1HW[1].min() == 255 and without.loss_mask_B1HW is None


@pytest.mark.parametrize("option", ["loss_mask", "reference_mask"])
def test_missing_masks_are_rejected_and_those_of_another_size_when_they_are_opened(option: str, tmp_path: Path) -> None:
    members = sample_of((60, 50))
    rejects = [each for each in read(tmp_path, members[:2], **{option: "mask.png"}) if isinstance(each, Rejected)]
    assert Counter(each.reason for each in rejects) == {"no mask": 1} and "mask.png" in rejects[0].detail
    with pytest.raises(Rejected, match=r"mask of another size: the mask has 30 x 50 px, the picture 60 x 50"):
        prepared(tmp_path, sample_of((60, 50), mask=blob((30, 50))), **{option: "mask.png"})
    with pytest.raises(Rejected, match="broken picture"):
        prepared(tmp_path, [*members[:2], ("a.mask.png", b"<html>")], **{option: "mask.png"})


@pytest.mark.parametrize("size", [(60, 50), (300, 500)])
@pytest.mark.parametrize("mask", ["mask.png", "alpha"])
def test_reference_masks_move_with_every_change_of_the_reference(
    mask: str, size: tuple[int, int], tmp_path: Path
) -> None:
    augment = Augmentation(area=0.4, flip=0.5)
    for index in range(4):
        plain = prepared(tmp_path, sample_of(size), index, augment=augment)
        masked = prepared(tmp_path, sample_of(size, alpha=True), index, augment=augment, reference_mask=mask)
        red_1HW, pad_311 = plain.reference_3HW[:1] / 255, torch.tensor(ImageColor.getrgb(PAD_COLOUR))[:, None, None]
        expected = pad_311 + red_1HW * (torch.tensor([255, 0, 0])[:, None, None] - pad_311)
        assert (masked.reference_3HW - expected).abs().mean() < 2 and 0.1 < red_1HW.mean() < 0.9
    assert torch.equal(plain.image_3HW, prepared(tmp_path, sample_of(size), 3, reference_mask="mask.png").image_3HW)


def test_each_reference_has_its_own_mask(tmp_path: Path) -> None:
    def reference(colour: str, kept: str) -> Members:
        picture = Image.new("RGB", (40, 40), colour)
        half = Image.new("L", (40, 40), 0)
        half.paste(255, (0, 0, 20, 40) if kept == "left" else (20, 0, 40, 40))
        return [(f"a.{colour}.png", saved(picture, "PNG")), (f"a.{colour}_mask.png", saved(half, "PNG"))]

    members = [*sample_of((60, 50)), *reference("lime", "left"), *reference("white", "right")]
    options = {"reference": ["lime.png", "white.png"], "reference_mask": ["lime_mask.png", "white_mask.png"]}
    seen = set()
    for index in range(12):
        reference_3HW = prepared(tmp_path, members, index, **options).reference_3HW
        seen.add(("lime" if reference_3HW[0].min() < 50 else "white", int(reference_3HW[1, 12, 2] > 200)))
    assert seen == {("lime", 1), ("white", 0)}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"loss_mask": "json"}, "data.loss_mask=json"),
        ({"reference_mask": ["a.png", "b.png"]}, "data.reference_mask=.*1 members, one for each picture"),
        ({"reference": ["a.jpg", "b.jpg"], "reference_mask": "a.png"}, "data.reference_mask=a.png: .*2 members"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path, sample_of((20, 20)), **options)


def test_a_mask_must_not_be_larger_than_allowed(tmp_path: Path) -> None:
    (record,) = read(tmp_path, sample_of((60, 50)), loss_mask="mask.png")
    assert isinstance(record, Record) and record.loss_mask is not None
    assert Image.open(io.BytesIO(record.loss_mask.data)).size == (60, 50)
    with pytest.raises(Rejected, match="too many pixels"):
        ImagePreparation(32, 24, (4, 8, 8), max_pixels=2000).sample(record, Address(0, 0, "train", "0.tar", 0), None)
