"""Decoding of whatever the web has, and cuts and resizes against PIL's and torchvision's own."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tars import noise_picture, saved
from torchvision.transforms import v2

from ipa.data.addresses import Address
from ipa.data.images.preparation import size_condition
from ipa.data.images.transforms import (
    FITS,
    HEADROOM,
    PAD_COLOUR,
    Background,
    Opened,
    cover,
    covering,
    cut_corner,
    fit_reference,
    open_picture,
    to_tensor,
)

BLUE = (59, 111, 212)
MILLION = 1_000_000
BICUBIC = v2.InterpolationMode.BICUBIC
Size = tuple[int, int]


def mild_noise(width: int, height: int) -> Image.Image:
    """Nothing overshoots: PIL resizes tall pictures in the other order of passes, and both clip in between."""
    return noise_picture(width, height, 80, 175)


def differ(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.uint8
    return int((ours.int() - theirs.int()).abs().max())


def psnr(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """In dB."""
    mse = (ours.double() - theirs.double()).square().mean().item()
    return 10 * math.log10(255**2 / max(mse, 1e-9))


# cuts

ODD_SIZES = [(40, 40), (61, 40), (62, 40), (40, 97), (16, 16), (9, 13), (50, 3), (17, 16), (16, 19), (451, 300)]


@pytest.mark.parametrize("size", [*ODD_SIZES, (3, 600), (700, 2)])
def test_a_square_is_torchvisions_resize_and_centre_crop(size: Size) -> None:
    picture = noise_picture(*size)
    theirs = v2.Compose([v2.Resize(16, BICUBIC), v2.CenterCrop(16)])(picture)

    assert differ(cover(Opened.of(picture), (16, 16)), to_tensor(theirs)) <= 1
    assert differ(fit_reference(Opened.of(picture), 16), to_tensor(theirs)) <= 1


@pytest.mark.parametrize("place", [(0.5, 0.5), (0.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("target", [(16, 16), (24, 8), (8, 40)])
@pytest.mark.parametrize("size", ODD_SIZES)
def test_any_cut_is_part_of_the_picture_resized_to_cover_it(
    size: Size, target: Size, place: tuple[float, float]
) -> None:
    picture = mild_noise(*size)
    (width, height), (left, top) = covering(size, target), cut_corner(size, target, place)
    whole = to_tensor(v2.Resize((height, width), BICUBIC)(picture))

    assert width >= target[0] and height >= target[1] and (width == target[0] or height == target[1])
    assert 0 <= left <= width - target[0] and 0 <= top <= height - target[1]
    part = whole[:, top : top + target[1], left : left + target[0]]
    assert differ(cover(Opened.of(picture), target, place), part) <= 1


@pytest.mark.parametrize("size", ODD_SIZES)
def test_the_size_condition_is_that_of_diffusers_training_script_for_sdxl(size: Size) -> None:
    """Its train_text_to_image_sdxl.py: the size before, the crop's place after resizing to the shortest side."""
    picture, edge = noise_picture(*size), 16
    resized = v2.Resize(edge)(picture)
    top = max(0, int(round((resized.height - edge) / 2.0)))  # noqa: RUF046
    left = max(0, int(round((resized.width - edge) / 2.0)))  # noqa: RUF046
    condition = size_condition(size, (edge, edge), (0.5, 0.5))

    assert condition.tolist() == [picture.height, picture.width, top, left, edge, edge]
    assert condition.dtype == torch.int64
    assert size_condition((100, 50), (12, 10), (1.0, 0.0)).tolist() == [50, 100, 0, 8, 10, 12]  # top before left


# references


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (60, 60), (1, 50), (7, 5)])
def test_a_padded_reference_holds_the_whole_picture(size: Size) -> None:
    picture = noise_picture(*size)
    width, height = (max(1, 20 * side // max(size)) for side in size)
    padded = fit_reference(Opened.of(picture), 20, "pad")
    inner = ((20 - height) // 2, (20 - height) // 2 + height, (20 - width) // 2, (20 - width) // 2 + width)
    whole = padded[:, inner[0] : inner[1], inner[2] : inner[3]].clone()

    assert padded.shape == (3, 20, 20)
    assert differ(whole, to_tensor(v2.Resize((height, width), BICUBIC)(picture))) <= 1
    padded[:, inner[0] : inner[1], inner[2] : inner[3]] = 0
    assert (padded.sum() == 0) == (width == height == 20)
    if width < 20 or height < 20:
        assert tuple(padded[:, 0, 0].tolist()) == (0x7A, 0x74, 0x68)
        assert PAD_COLOUR == "#7a7468"  # what CLIP normalises to zero


def test_every_fit_has_words_of_its_own() -> None:
    picture = mild_noise(20, 61)
    squashed = v2.Resize((16, 16), BICUBIC)(picture)
    assert differ(fit_reference(Opened.of(picture), 16, "squash"), to_tensor(squashed)) <= 1
    assert list(FITS) == ["crop", "pad", "squash"]
    assert FITS["crop"].words == "shortest side bicubic, centre crop"
    assert len({fit.words for fit in FITS.values()}) == 3
    with pytest.raises(ValueError, match=r"data\.reference_fit=stretch: one of crop, pad, squash"):
        fit_reference(Opened.of(noise_picture(4, 4)), 2, "stretch")


# less than the whole work


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return noise_picture(6, 5).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def photograph(width: int, height: int, falloff: float = 1.0) -> Image.Image:
    """Noise with amplitude ∝ f^-falloff: 1 is the sharpest that photographs are, 1.5 costs as many bytes as most do."""
    draw = np.random.default_rng(1)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
    spectrum = np.fft.rfft2(draw.standard_normal((3, height, width))) / frequency**falloff
    noise = np.fft.irfft2(spectrum, s=(height, width))
    grey, red, blue = (plane / plane.std() for plane in noise)
    pixels = np.stack([grey, grey + 0.3 * red, grey + 0.3 * blue], -1) * 45 + 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def sharp(width: int, height: int) -> Image.Image:
    """A picture of 64 px with plain colours, enlarged without smoothing, as in the demo world."""
    return (
        noise_picture(5, 4).resize((64, 64), Image.Resampling.NEAREST).resize((width, height), Image.Resampling.NEAREST)
    )


WITH_HEADROOM = [((500, 907), (112, 112), 2), ((1024, 768), (48, 48), 8), ((1023, 767), (96, 90), 4)]
AS_IN_TRAINING = [((1024, 1024), (512, 512), 2), ((1200, 900), (224, 224), 4), ((1024, 768), (96, 80), 8)]


@pytest.mark.parametrize(
    ("kind", "size", "target", "scale", "headroom"),
    [
        *((kind, *case, HEADROOM) for kind in (smooth, photograph, sharp) for case in WITH_HEADROOM),
        *((kind, *case, 1) for kind in (smooth, partial(photograph, falloff=1.5), sharp) for case in AS_IN_TRAINING),
        *((partial(smooth, mode=mode), (320, 200), (40, 40), 2, HEADROOM) for mode in ("L", "CMYK")),
    ],
)
def test_a_jpeg_decoded_at_a_fraction_gives_the_same_pictures(
    kind: Callable[..., Image.Image], size: Size, target: Size, scale: int, headroom: float
) -> None:
    """Target, and reference made from the reduced target, within 40 dB of the full decoding.

    Without headroom, as in training, that holds for all but the sharpest photographs.
    """
    data, reference_px = saved(kind(*size), "JPEG", quality=90), min(target) * 7 // 16
    whole = open_picture(data, "white", MILLION * 2)
    reduced = open_picture(data, "white", MILLION * 2, [target, (reference_px, reference_px)], headroom)
    ours, place = reduced.shrunk(target), (0.2, 0.7)

    assert reduced.size == whole.size == size
    assert reduced.span == (size[0] / scale, size[1] / scale)
    assert all(decoded >= headroom * need for decoded, need in zip(reduced.span, target, strict=True))
    assert psnr(cover(ours, target, place), cover(whole, target, place)) > 40
    for fit in FITS:
        assert psnr(fit_reference(ours, reference_px, fit), fit_reference(whole, reference_px, fit)) > 40


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(320, 200), (321, 199)])
def test_a_turned_picture_is_decoded_at_a_fraction_that_divides_it(size: Size, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data, target = saved(sharp(*size), "JPEG", exif=exif), (40, 30)
    whole, reduced = (open_picture(data, "white", MILLION, needs) for needs in ([], [target]))
    turned = orientation > 4
    least = min(side / need for side, need in zip(size, target[::-1] if turned else target, strict=True))
    scale = 1 if orientation > 1 and size[0] % 2 else 2

    assert least > 4
    assert reduced.size == whole.size == (size[::-1] if turned else size)
    assert reduced.span == tuple(side / scale for side in whole.size)
    assert psnr(cover(reduced, target), cover(whole, target)) > 40


def test_a_reference_that_needs_more_than_the_target_is_made_from_the_larger_picture() -> None:
    picture = Opened.of(noise_picture(200, 160))
    small = picture.shrunk((40, 40))

    assert small.pixels_3HW.shape == (3, 40, 50) and small.size == (200, 160)
    for edge in (21, 40, 64):  # the same as without
        assert differ(fit_reference(small, edge), fit_reference(picture, edge)) == 0
    assert 0 < differ(fit_reference(small, 20), fit_reference(picture, 20)) < 10


def test_long_pictures_are_not_resized_as_a_whole() -> None:
    """A line of 30,000 px would have 15 million px across for 512 px."""
    line = Opened.of(Image.new("RGB", (30_000, 1), "teal"))

    assert line.shrunk((512, 512)) is line
    assert cover(line, (512, 512)).unique().tolist() == [0, 128]


# backgrounds


def at(index: int, epoch: int = 0) -> Address:
    return Address(0, epoch, "train", "00000.tar", index)


def test_background_shares_and_colours() -> None:
    assert {Background().colour(at(i)) for i in range(20)} == {"white"}
    background = Background(["red", "green"], white=0.5)
    drawn = [background.colour(at(i)) for i in range(1000)]
    assert drawn == [background.colour(at(i)) for i in range(1000)]
    assert drawn != [background.colour(at(i, epoch=1)) for i in range(1000)]
    assert drawn.count("white") == pytest.approx(500, abs=60)
    assert drawn.count("red") == pytest.approx(250, abs=60)


@pytest.mark.parametrize(
    ("colours", "words"),
    [([], "colours"), (["blurple"], "blurple"), *((each, "background") for each in (5, [5], ["mud"], None))],
    ids=str,
)
def test_backgrounds_that_are_none_are_named(colours: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Background(colours, white=0.5)


def test_without_headroom_the_sharpest_photographs_lose_quality() -> None:
    """Why more can be asked for: the decoder's filter is none of bicubic's."""
    data, target = saved(photograph(512, 512), "JPEG", quality=90), (256, 256)
    whole = open_picture(data, "white", MILLION)
    reduced = open_picture(data, "white", MILLION, [target], headroom=1)

    assert reduced.span == target and whole.span == open_picture(data, "white", MILLION, [target]).span == (512, 512)
    assert psnr(cover(reduced, target), cover(whole, target)) < 38


def test_a_small_picture_is_enlarged_once_at_most() -> None:
    picture = Opened.of(noise_picture(20, 16))
    assert picture.shrunk((40, 40)) is picture and torch.equal(cover(picture, (20, 16)), picture.pixels_3HW)
    assert picture.shrunk((16, 16)).shrunk((8, 8)).size == (20, 16)
