"""Decoding of whatever the web has: an image is its pixels, whatever is stored next to them."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from tars import bomb, noise_picture, png, png_chunk, saved

from ipa.data.images.opening import FORMATS, known_formats, picture_size
from ipa.data.images.transforms import open_picture, read_picture, to_tensor
from ipa.data.rejects import Rejected
from ipa.errors import UserError
from ipa.files import PICTURE_EXTENSIONS

BLUE = (59, 111, 212)
MILLION = 1_000_000
Size = tuple[int, int]


def gradient() -> Image.Image:
    """All hues, smoothly, so that JPEG keeps them to a level or two."""
    across, down = np.meshgrid(np.linspace(90, 190, 96), np.linspace(100, 180, 64))
    pixels = np.stack([across, 280 - across, down], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def opened(data: bytes, background: str = "white") -> Image.Image:
    """Decoded in full."""
    return Image.fromarray(open_picture(data, background, MILLION).pixels_3HW.permute(1, 2, 0).numpy())


def differ(ours: Image.Image, theirs: Image.Image) -> int:
    return int((to_tensor(ours).int() - to_tensor(theirs).int()).abs().max())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_the_background(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    data = saved(clear.quantize() if mode == "P" else clear.convert(mode), "PNG")
    assert opened(data, "#3b6fd4").getpixel((1, 1)) == BLUE
    half = opened(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG"))
    assert half.getpixel((0, 0)) == (127, 127, 127)
    red = Image.new("RGB", (4, 4), "red")  # as the transparent colour of a palette or of RGB
    palette = red.quantize()
    assert opened(saved(palette, "GIF", transparency=palette.getpixel((0, 0))), "#3b6fd4").getpixel((1, 1)) == BLUE
    assert opened(saved(red, "PNG", transparency=(255, 0, 0)), "#3b6fd4").getpixel((1, 1)) == BLUE


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1", "LAB"])
def test_opaque_pictures_become_rgb(mode: str) -> None:
    picture = gradient().convert(mode)
    assert differ(opened(saved(picture, "TIFF"), "teal"), picture.convert("RGB")) == 0


@pytest.mark.parametrize("colour", ["white", "black", "teal", "orange"])
def test_cmyk_jpegs_have_their_colours(colour: str) -> None:
    """PIL writes them as Adobe does, inverted; a reader that overlooks it sees a negative."""
    picture = Image.new("RGB", (16, 16), colour)
    data = saved(picture.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert differ(opened(data), picture) <= 6


RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(4, 0)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RAMP, "PNG"),
        (RAMP, "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        (RAMP.astype(np.int32) * 32768, "TIFF"),
        ((RAMP / 65535).astype(np.float32), "TIFF"),
        ((RAMP / 257).astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
    ],
    ids=["16 bit PNG", "16 bit TIFF", "16 of 32 bit", "32 bit", "0 to 1", "0 to 255", "0 to 65535"],
)
def test_deep_greys_are_scaled_and_not_clipped(values: np.ndarray, kind: str) -> None:
    pixels = np.asarray(opened(saved(Image.fromarray(values), kind)))[0, :, 0]
    assert np.abs(pixels - RAMP[0] / 257).max() <= 1


def rgb16_tiff(values: np.ndarray) -> bytes:
    """Grey values as uncompressed little-endian RGB."""
    height, width = values.shape
    pixels = values[..., None].repeat(3, -1).astype("<u2").tobytes()
    tags = [(256, width), (257, height), (259, 1), (262, 2), (273, 200), (277, 3), (278, height), (279, len(pixels))]
    entries = [(tag, 4, 1, value) for tag, value in tags] + [(258, 3, 3, 190)]
    ifd = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + n.to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, kind, n, value in sorted(entries)
    )
    head = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little") + ifd + bytes(4)
    return head.ljust(190, b"\0") + b"\x10\0\x10\0\x10\0".ljust(10, b"\0") + pixels


def test_deep_colours_are_scaled() -> None:
    """A TIFF of 16 bits a channel, which PIL reads but does not write."""
    picture = opened(rgb16_tiff(RAMP))
    assert picture.size == (64, 4)
    assert np.abs(np.asarray(picture)[0, :, 1] - RAMP[0] / 257).max() <= 1


def test_pixels_that_are_no_numbers_are_rejected() -> None:
    with pytest.raises(Rejected, match="no numbers"):
        opened(saved(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"))


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_of_an_animation_the_first_frame_counts(kind: str, options: dict[str, object]) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "lime")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert opened(data).getcolors() == [(24, (255, 0, 0))]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(noise_picture(24, 16), kind, exif=exif)
    theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    ours = open_picture(data, "white", MILLION)

    assert ours.size == picture_size(data) == theirs.size == ((24, 16) if orientation < 5 else (16, 24))
    assert kind != "JPEG" or picture_size(data[:-10]) == ours.size  # the header is enough
    assert torch.equal(ours.pixels_3HW, to_tensor(theirs.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "progressive JPEG", "LZW TIFF"])
@pytest.mark.parametrize("needs", [[], [(8, 8)]], ids=["in full", "scaled"])
def test_truncated_pictures_are_rejected(kind: str, needs: list[Size]) -> None:
    """However little is missing; no decoder fills the rest with grey."""
    options = {"progressive": {"progressive": True}, "LZW": {"compression": "tiff_lzw"}}.get(kind.split()[0], {})
    data = saved(noise_picture(64, 64), kind.split()[-1], **options)
    for kept in (20, len(data) // 2, len(data) - 40):
        with pytest.raises(Rejected) as caught:
            open_picture(data[:kept], "white", MILLION, needs)
        assert caught.value.reason == "broken picture"


@pytest.mark.parametrize(("data", "most"), [(png((30, 20)), 599), (bomb(), MILLION), (bomb(), 10**12)])
def test_too_many_pixels_are_rejected_before_they_are_decoded(data: bytes, most: int) -> None:
    """The bomb has no pixels to decode: trying would find it broken."""
    with pytest.raises(Rejected) as caught:
        open_picture(data, "white", most)
    assert caught.value.reason == "too many pixels"


# what is stored next to the pixels


def png_with(*chunks: bytes, after: bytes = b"") -> bytes:
    plain = saved(gradient(), "PNG")
    return plain[:33] + b"".join(chunks) + plain[33:] + after


def jpeg_with(*segments: tuple[int, bytes], after: bytes = b"") -> bytes:
    plain = saved(gradient(), "JPEG", quality=100, subsampling=0)
    inserted = (bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content for kind, content in segments)
    return plain[:2] + b"".join(inserted) + plain[2:] + after


def odd_exif() -> bytes:
    """Orientation 6 between tags whose types and values do not fit."""
    entries = [(0x010E, 5, 9, 0xFFFF), (ExifTags.Base.Orientation, 3, 1, 6), (0x011A, 2, 3, 0x00303030)]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


SCANS = b"\xff\xda" * 300
ODD: dict[str, Callable[[], bytes]] = {
    "EXIF of a PNG": lambda: png_with(png_chunk(b"eXIf", b"no EXIF at all")),
    "EXIF of a WebP": lambda: saved(gradient(), "WEBP", lossless=True, exif=b"no EXIF at all"),
    "EXIF of a JPEG": lambda: jpeg_with((0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(9))),
    "text of 5 MB": lambda: png_with(png_chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(5_000_000)))),
    "profile of 5 MB": lambda: png_with(png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(5_000_000)))),
    "checksum of a comment": lambda: png_with(png_chunk(b"tEXt", b"key\0value")[:-4] + b"oops"),
    "profile that is none": lambda: jpeg_with((0xE2, b"ICC_PROFILE\0\1\1" + b"no profile" * 20)),
    "damaged index of an MPO": lambda: jpeg_with((0xE2, b"MPF\0II*\0" + b"\xff" * 40)),
    "thumbnail of many scans": lambda: jpeg_with((0xE1, SCANS)),
    "a film behind a JPEG": lambda: jpeg_with(after=SCANS),
    "bytes behind a PNG": lambda: png_with(after=b"x" * 5000),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_stored_next_to_the_pixels_decides_nothing(kind: str) -> None:
    data = ODD[kind]()
    plain = opened(jpeg_with()) if data.startswith(b"\xff\xd8") else gradient()
    assert differ(opened(data), plain) == 0 and picture_size(data) == (96, 64)


def test_an_orientation_between_odd_tags_counts() -> None:
    data = jpeg_with((0xE1, odd_exif()))
    assert picture_size(data) == open_picture(data, "white", MILLION, [(32, 32)]).size == (64, 96)
    assert differ(opened(data), opened(jpeg_with()).rotate(-90, expand=True)) == 0


# colours


ADOBE_RGB = (0.64, 0.33), (0.21, 0.71), (0.15, 0.06)


def make_profile(primaries: Sequence[tuple[float, float]] = ADOBE_RGB, gamma: float = 2.2) -> bytes:
    """ICC version 2 (ICC.1:2001-04): the primaries under D50 and one gamma."""
    white = np.array([0.9642, 1.0, 0.8249])
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries]).T
    matrix = columns * np.linalg.solve(columns, white)

    def fixed(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": fixed(white), **{name + b"XYZ": fixed(matrix[:, i]) for i, name in enumerate((b"r", b"g", b"b"))}}
    tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table, body = table + name + struct.pack(">II", at + len(body), len(content)), body + content
    header = struct.pack(">I4sI4s4s4s", at + len(body), b"\0" * 4, 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header = header.ljust(36, b"\0") + b"acsp" + bytes(28) + fixed(white)[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def stored_in(profile: bytes, picture: Image.Image) -> Image.Image:
    """The same colours as numbers of another space."""
    target, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(picture, srgb, target, outputMode=picture.mode)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_wide_colours_are_converted_to_srgb(kind: str) -> None:
    profile, picture = make_profile(), gradient()
    numbers = stored_in(profile, picture)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    changes = np.abs(np.asarray(opened(saved(numbers, kind, icc_profile=profile, **options))).astype(int) - picture)
    assert differ(numbers, picture) > 10
    assert (changes.mean() if kind == "JPEG" else changes.max()) <= 2


def test_transparency_palettes_and_greys_have_profiles_too() -> None:
    profile, picture = make_profile(), gradient()
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    assert opened(saved(clear, "PNG", icc_profile=profile), "#3b6fd4").getcolors() == [(96 * 64, BLUE)]
    palette = stored_in(profile, Image.new("RGB", (4, 4), BLUE)).quantize(2)
    assert differ(opened(saved(palette, "PNG", icc_profile=profile)), Image.new("RGB", (4, 4), BLUE)) <= 2
    assert (
        differ(opened(saved(picture.convert("L"), "PNG", icc_profile=profile)), picture.convert("L").convert("RGB"))
        == 0
    )


def test_a_profile_of_srgb_changes_no_pixel() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert differ(opened(saved(gradient(), "PNG", icc_profile=srgb)), gradient()) == 0


# what is no picture


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG is not read"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not read: convert it, or install pillow-heif"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"xx", "format is not known"),
        (png()[:50], "."),
    ],
)
def test_what_is_no_picture_is_rejected_in_words(tmp_path: Path, data: bytes, words: str) -> None:
    for read in (picture_size, lambda data: open_picture(data, "white", MILLION)):
        if not (data.startswith(b"\x89PNG") and read is picture_size):  # whose header is sound
            with pytest.raises(Rejected, match=words) as caught:
                read(data)
            assert caught.value.reason == "broken picture"
    file = tmp_path / "a.png"
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"image=.*a.png.*{words}"):
        read_picture(file)


def test_every_format_has_an_extension() -> None:
    readable = {
        kind for kind, extension in ((Image.registered_extensions().get(e), e) for e in PICTURE_EXTENSIONS) if kind
    }
    assert set(known_formats()) - {"MPO", "PPM"} <= readable | {"HEIF"} and readable <= set(FORMATS)
