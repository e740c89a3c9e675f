"""The bytes of an image → its pixels: upright, sRGB, 8 bits. Everything that reads images reads them here.

    size = picture_size(data)                                   # from the header, nothing is decoded
    picture = with_picture(data, upright)                       # a PIL image, RGB or RGBA

Metadata never makes an image unusable: unreadable EXIF means no rotation, ancillary data that PIL refuses are dropped,
and limits apply up to the end of the image. ICC profiles are applied: images in other colour spaces are converted to
sRGB (littleCMS, perceptual intent).
"""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from PIL.Image import Transpose as Turn

from ipa.data.rejects import Reason, Rejected
from ipa.errors import brief

Size = tuple[int, int]
Found = TypeVar("Found")

# the web's formats; PIL knows more, but runs Ghostscript for one of them
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
JPEGS = ("JPEG", "MPO")
# first bytes of other files, and the message for them
OTHERS = (
    (rb"$", "it is empty"),
    (rb"\s*<(!doctype html|html)", "it is a web page"),
    (rb"\s*<(\?xml|svg)", "SVG is not read: convert it to PNG"),
    (rb".{4}ftyp(hei|hev|mif|msf)", "HEIC is not read: convert it, or install pillow-heif"),
    (rb".{4}ftypavi", "AVIF is not read by this Pillow: install Pillow 11.3 or newer"),
    (rb"\xff\x0a|.{4}JXL ", "JPEG XL is not read: convert it"),
    (rb"8BPS|%PDF|%!PS", "Photoshop, PDF and PostScript files are not read: convert them"),
)
SCAN, MAX_SCANS = b"\xff\xda", 100  # a progressive JPEG has about ten; each of a bomb's costs a pass over all pixels
MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # not a stuffed 0xff in a scan, a restart in it, or fill
# modes of more than 8 bits, and what white may be in them
WHITES: dict[str, tuple[int, ...]] = {"I;16": (65535,), "I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}
SAME_COLOURS = 2  # of 255: a profile that changes no colour by more is sRGB, as nearly all of the web's are
SHORT = 3  # a type of EXIF's values
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE}
TURNS |= {6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}


def with_picture(data: bytes, use: Callable[[Image.Image], Found]) -> Found:
    """Open a picture and return ``use(picture)``; raises ``Rejected`` for anything that PIL raises on damaged bytes."""
    with rejecting(data):
        try:
            return use(open_header(data))
        except (Rejected, Image.DecompressionBombError, MemoryError):
            raise
        except Exception:
            bare = without_metadata(data)
            if len(bare) == len(data):
                raise
            return use(open_header(bare))


@contextmanager
def rejecting(data: bytes) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of odd metadata and of sizes that data.max_pixels decides on
            yield
    except Image.DecompressionBombError as error:
        raise Rejected(Reason.TOO_MANY_PIXELS, str(error)) from error
    except Rejected:
        raise
    except Exception as error:  # a decoder may raise nearly anything
        other = next((words for begin, words in OTHERS if re.match(begin, data, re.IGNORECASE | re.DOTALL)), None)
        unknown = "its format is not known" if isinstance(error, UnidentifiedImageError) else brief(error)
        raise Rejected(Reason.BROKEN_PICTURE, other or unknown) from error


def open_header(data: bytes) -> Image.Image:
    """The picture before decoding; raises ``Rejected``, or whatever PIL raises on damaged bytes."""
    picture = Image.open(io.BytesIO(data), formats=known_formats())
    if picture.format in JPEGS and data.count(SCAN) > MAX_SCANS and (scans := count_scans(data)) > MAX_SCANS:
        raise Rejected(Reason.BROKEN_PICTURE, f"a JPEG of {scans} scans")
    check_size(picture)
    return picture


def check_size(picture: Image.Image) -> None:
    if min(picture.size) < 1:
        raise Rejected(Reason.BROKEN_PICTURE, "it has no pixels")


@functools.cache
def known_formats() -> tuple[str, ...]:
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def count_scans(data: bytes) -> int:
    """Scans of a JPEG's first image: not those of thumbnails in its metadata, and nothing behind its end."""
    at, scans = 2, 0
    while (marker := MARKER.search(data, at)) and marker[1] != b"\xd9":
        scans += marker[1] == SCAN[1:]
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def without_metadata(data: bytes) -> bytes:
    """A PNG of its critical chunks, whose names begin with a capital, and tRNS; other files as they are.

    PIL refuses a PNG for its texts, profile or checksums; of the other formats it skips what it cannot read.
    """
    at, kind, kept = 8, b"", [data[:8]]
    while data.startswith(b"\x89PNG") and at < len(data) and kind != b"IEND":
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if kind[:1].isupper() or kind == b"tRNS":
            kept.append(data[at:end])
        at = end
    return b"".join(kept) if at > 8 else data


def picture_size(data: bytes) -> Size:
    """Width and height of the upright picture, from its header; nothing is decoded. Raises ``Rejected``.

    The metadata's ``width`` and ``height`` are not used: img2dataset writes the size before the EXIF rotation, and
    another tool may have resized the picture since. Reading a header takes 20 μs.
    """
    return with_picture(data, upright_size)


def upright_size(picture: Image.Image) -> Size:
    swapped = orientation(picture) >= 5 and picture.format != "TIFF"  # whose size PIL swaps itself
    return picture.size[::-1] if swapped else picture.size


def orientation(picture: Image.Image) -> int:
    """EXIF's, from 1 (upright) to 8; 1 if it cannot be read."""
    try:
        found = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)  # a PNG's own method would decode it
    except Exception:  # whatever a parser raises on damaged bytes
        return 1
    found = found or stored_orientation(picture.info.get("exif", b""))
    return found if found in TURNS else 1


def stored_orientation(exif: bytes) -> int | None:
    """Of the first directory: before version 13, Pillow stops at the first tag whose value is not there."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    with suppress(struct.error):
        if order is not None:
            (start,) = struct.unpack_from(f"{order}I", tiff, 4)
            (count,) = struct.unpack_from(f"{order}H", tiff, start)
            for at in range(start + 2, start + 2 + 12 * count, 12):
                tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, at)
                if (tag, kind) == (ExifTags.Base.Orientation, SHORT):
                    return value
    return None


def upright(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits in sRGB, or RGBA if it has transparency, rotated as EXIF says; decodes the picture."""
    picture.load()  # a TIFF is rotated in this
    turn, profile = TURNS.get(orientation(picture)), picture.info.get("icc_profile")
    if picture.mode[:4] in WHITES:
        picture = to_eight_bits(picture)
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    if profile and (converted := in_srgb(picture, profile)):
        picture = converted
    picture = picture if picture.mode == mode else picture.convert(mode)
    return picture if turn is None else picture.transpose(turn)


def in_srgb(picture: Image.Image, profile: bytes) -> Image.Image | None:
    """RGB or RGBA; None if the colours are sRGB already, or the profile does not fit the picture."""
    stored = {"LA": "L", "1": "L"}.get(picture.mode, picture.mode if picture.mode in ("L", "CMYK") else "RGB")
    transform = to_srgb(profile, stored)
    if transform is None:
        return None
    found = transform.apply(picture if picture.mode == stored else picture.convert(stored))
    if picture.has_transparency_data:
        found.putalpha(picture.convert("RGBA").getchannel("A"))
    return found


@functools.lru_cache(maxsize=64)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Colours of a profile → sRGB; None if it cannot be read, is for another mode, or changes no colour visibly."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)).convert(mode)
    changes = np.asarray(transform.apply(colours)).astype(int) - np.asarray(colours.convert("RGB"))
    return None if np.abs(changes).max() <= SAME_COLOURS else transform


class Pixels(NamedTuple):
    """An upright RGB picture, the original's size (px), and what of its pixels is filled: see ``transforms.Opened``."""

    picture: Image.Image
    size: Size
    span: tuple[float, float]


def decode_picture(data: bytes, background: str, max_pixels: int, needs: Sequence[Size], headroom: float) -> Pixels:
    """See ``transforms.open_picture``; raises ``Rejected``."""
    return with_picture(data, lambda picture: decode(picture, background, max_pixels, needs, headroom))


def decode_open(picture: Image.Image, background: str) -> Pixels:
    """A picture that a caller of this library has opened or made; raises ``Rejected``."""
    with rejecting(b""):
        check_size(picture)
        return decode(picture, background, picture.width * picture.height)


def decode(
    picture: Image.Image, background: str, max_pixels: int, needs: Sequence[Size] = (), headroom: float = 1
) -> Pixels:
    """Raises ``Rejected``, or whatever PIL raises on damaged bytes."""
    if picture.width * picture.height > max_pixels:
        size_px = f"{picture.width} x {picture.height}"
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{size_px}, more than data.max_pixels={max_pixels}")
    size, scale = None, 1
    if needs and picture.format in JPEGS:
        size, scale = upright_size(picture), scale_down(picture, needs, headroom)
    pixels = flatten(upright(picture), background)
    width, height = size = size or pixels.size
    return Pixels(pixels, size, (width / scale, height / scale))


def scale_down(picture: Image.Image, needs: Sequence[Size], headroom: float) -> int:
    """Make libjpeg decode at 1/2, 1/4 or 1/8 if all ``needs`` keep the headroom; returns 2, 4, 8, or 1."""
    turn = orientation(picture)
    sides = [need[::-1] if turn >= 5 else need for need in needs]
    width, height = picture.size
    for scale in (8, 4, 2):
        # turning would bring the half empty pixels of an inexact division to the near edges
        exact = turn == 1 or width % scale == height % scale == 0
        if exact and all(covers((width / scale, height / scale), side, headroom) for side in sides):
            picture.draft(None, (width // scale, height // scale))
            return scale
    return 1


def covers(have: tuple[float, float], need: Size, times: float = 1) -> bool:
    return all(side >= times * least for side, least in zip(have, need, strict=True))


def flatten(picture: Image.Image, background: str) -> Image.Image:
    """RGB of an RGB or RGBA picture, composited on ``background``."""
    if picture.mode == "RGB":
        return picture
    canvas = Image.new("RGBA", picture.size, background)
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits → 8, where PIL would clip.

    32 bits do not define white: it is the first of ``WHITES`` that no pixel exceeds, else the largest pixel.
    """
    values = np.asarray(picture).astype(np.float64)
    top = values.max()
    if not np.isfinite(values).all():
        raise Rejected(Reason.BROKEN_PICTURE, "it has pixels that are no numbers")
    white = next((white for white in WHITES[picture.mode[:4]] if top <= white), top)
    return Image.fromarray((values * (255 / white)).clip(0, 255).round().astype(np.uint8))
