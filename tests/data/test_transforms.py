import io

import numpy as np
import pytest
import torch
from conftest import png
from PIL import Image
from torchvision.transforms import v2

from ipa.data.addresses import Address
from ipa.data.rejects import Rejected
from ipa.data.samples import size_condition
from ipa.data.transforms import Background, cut_corner, open_picture, square, to_tensor

BLUE = (59, 111, 212)
MILLION = 1_000_000


def noise_picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("size", [(40, 40), (61, 40), (40, 97), (16, 16), (9, 13), (50, 3)])
def test_square_equals_torchvision_resize_and_centre_crop(size: tuple[int, int]) -> None:
    picture = noise_picture(*size)
    theirs = v2.Compose([v2.Resize(16, v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)])(picture)
    difference = to_tensor(square(picture, 16)).int() - to_tensor(theirs).int()
    assert difference.abs().max() <= 1


ODD_SIZES = [(40, 40), (61, 40), (62, 40), (40, 97), (16, 16), (9, 13), (50, 3), (17, 16), (16, 19), (451, 300)]


@pytest.mark.parametrize("size", ODD_SIZES)
def test_the_corner_is_where_the_square_lies_in_the_resized_picture(size: tuple[int, int]) -> None:
    picture = noise_picture(*size)
    resized = to_tensor(v2.Resize(16, v2.InterpolationMode.BICUBIC)(picture)).int()
    left, top = cut_corner(size, 16)
    _, height, width = resized.shape
    differences = {
        (x, y): float((resized[:, y : y + 16, x : x + 16] - to_tensor(square(picture, 16))).abs().max())
        for x in range(width - 15)
        for y in range(height - 15)
    }

    assert differences.pop((left, top)) <= 1
    assert min(differences.values(), default=99) > 5


@pytest.mark.parametrize("size", ODD_SIZES)
def test_the_size_condition_is_that_of_diffusers_training_script_for_sdxl(size: tuple[int, int]) -> None:
    """Its train_text_to_image_sdxl.py: the size before, the crop's place after resizing to the shortest side."""
    picture, edge = noise_picture(*size), 16
    resized = v2.Resize(edge)(picture)
    top = max(0, int(round((resized.height - edge) / 2.0)))  # noqa: RUF046
    left = max(0, int(round((resized.width - edge) / 2.0)))  # noqa: RUF046

    assert size_condition(size, edge).tolist() == [picture.height, picture.width, top, left, edge, edge]
    assert size_condition(size, edge).dtype == torch.int64


def test_sizes_are_height_before_width_and_top_before_left() -> None:
    assert size_condition((100, 50), 10).tolist() == [50, 100, 0, 5, 10, 10]
    assert size_condition((50, 100), 10).tolist() == [100, 50, 5, 0, 10, 10]
    assert size_condition((5, 8), 10).tolist() == [8, 5, 3, 0, 10, 10]  # small ones are enlarged


def test_square_of_the_right_size_changes_nothing() -> None:
    picture = noise_picture(16, 16)
    assert square(picture, 16).tobytes() == picture.tobytes()


def test_tensor_is_uint8_channels_first() -> None:
    image_3HW = to_tensor(Image.new("RGB", (5, 4), BLUE))
    assert image_3HW.dtype == torch.uint8 and image_3HW.shape == (3, 4, 5)
    assert tuple(image_3HW[:, 0, 0].tolist()) == BLUE


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_the_background(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    data = saved(clear.quantize() if mode == "P" else clear.convert(mode), "PNG")
    assert open_picture(data, "#3b6fd4", MILLION).getpixel((1, 1)) == BLUE


def test_half_transparent_pixels_mix() -> None:
    picture = open_picture(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG"), "white", MILLION)
    assert picture.getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1"])
def test_opaque_pictures_become_rgb(mode: str) -> None:
    data = saved(Image.new(mode, (4, 4)), "TIFF")
    assert open_picture(data, "teal", MILLION).mode == "RGB"


def test_exif_orientation_is_applied() -> None:
    picture, exif = Image.new("RGB", (6, 4)), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert open_picture(saved(picture, "JPEG", exif=exif), "white", MILLION).size == (4, 6)


@pytest.mark.parametrize("data", [b"", b"<html>", png()[:50], saved(noise_picture(64, 64), "JPEG")[:900]])
def test_broken_pictures_are_rejected(data: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        open_picture(data, "white", MILLION)
    assert caught.value.reason == "broken picture"


def test_too_many_pixels_are_rejected() -> None:
    with pytest.raises(Rejected) as caught:
        open_picture(png((30, 20)), "white", 599)
    assert caught.value.reason == "too many pixels"


def at(index: int, epoch: int = 0) -> Address:
    return Address(0, epoch, "train", "00000.tar", index)


def test_background_is_white_by_default() -> None:
    assert {Background().colour(at(i)) for i in range(20)} == {"white"}


def test_background_shares_and_colours() -> None:
    background = Background(["red", "green"], white=0.5)
    drawn = [background.colour(at(i)) for i in range(1000)]
    assert drawn == [background.colour(at(i)) for i in range(1000)]
    assert drawn != [background.colour(at(i, epoch=1)) for i in range(1000)]
    assert drawn.count("white") == pytest.approx(500, abs=60)
    assert drawn.count("red") == pytest.approx(250, abs=60)


def test_background_needs_colours_and_knows_them() -> None:
    with pytest.raises(ValueError, match="colours"):
        Background(white=0.5)
    with pytest.raises(ValueError, match="unknown color"):
        Background(["blurple"], white=0.5)
