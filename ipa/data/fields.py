"""What the members of one sample say: its picture, texts and metadata, each read only when it is asked for."""

from __future__ import annotations

import functools
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from PIL import ExifTags, Image

from ipa.data.rejects import BROKEN_METADATA, BROKEN_PICTURE, NO_PICTURE, TOO_LARGE, TOO_MANY_PIXELS, Rejected

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
METADATA = "json"
ENTRY = f"{METADATA}."  # begins the key of an entry of the metadata: json.NAME
# what the web has; PIL knows more formats, but runs Ghostscript for one of them
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
MOST_TEXT, MOST_METADATA = 1 << 20, 1 << 24  # bytes
SCAN, MOST_SCANS = b"\xff\xda", 100  # a progressive JPEG has about ten; each of a bomb's is all its pixels' work
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class Fields:
    """One sample: extension → content; ``references`` are other pictures than its own. Readings raise ``Rejected``."""

    def __init__(self, members: Mapping[str, bytes], references: Sequence[str] = ()) -> None:
        self.members, self.references = members, references

    @cached_property
    def picture(self) -> bytes:
        for extension in PICTURES:
            if extension in self.members and extension not in self.references:
                return self.members[extension]
        raise Rejected(NO_PICTURE)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, see ``picture_size``."""
        return picture_size(self.picture)

    @property
    def known_size(self) -> tuple[int, int] | None:
        """The size if it has been looked up."""
        return self.__dict__.get("size")

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Empty without a JSON member."""
        try:
            entries = json.loads(self.text(METADATA, MOST_METADATA) if METADATA in self.members else "{}")
        except (ValueError, RecursionError) as error:
            raise Rejected(BROKEN_METADATA, str(error)) from error
        if not isinstance(entries, dict):
            raise Rejected(BROKEN_METADATA, f"a {type(entries).__name__}, no mapping")
        return entries

    def text(self, extension: str, most: int = MOST_TEXT) -> str:
        """A member's text; UnicodeDecodeError is the caller's to tell."""
        if len(self.members[extension]) > most:
            raise Rejected(TOO_LARGE, f"{extension}: {len(self.members[extension]):,} bytes of text")
        return self.members[extension].decode()


def open_header(data: bytes) -> Image.Image:
    """The picture, of which nothing is decoded yet; raises ``Rejected``, or whatever PIL does on damaged bytes."""
    picture = Image.open(io.BytesIO(data), formats=known_formats())
    if picture.format in ("JPEG", "MPO") and data.count(SCAN) > MOST_SCANS:
        raise Rejected(BROKEN_PICTURE, f"a JPEG of {data.count(SCAN)} scans")
    return picture


@functools.cache
def known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height of the upright picture, from its header; nothing is decoded. Raises ``Rejected``.

    The metadata's ``width`` and ``height`` are not asked: of pictures that img2dataset stored as they came they tell
    the size before the camera's turn, and another tool may have resized the picture since. A header takes 20 μs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of odd metadata and of sizes that data.max_pixels decides on
            picture = open_header(data)
            exif = Image.Image.getexif(picture)  # a PNG's own method would decode it
    except Image.DecompressionBombError as error:
        raise Rejected(TOO_MANY_PIXELS, str(error)) from error
    except Rejected:
        raise
    except Exception as error:  # a decoder on damaged bytes raises nearly anything
        raise Rejected(BROKEN_PICTURE, repr(error)) from error
    if min(picture.size) < 1:
        raise Rejected(BROKEN_PICTURE, "it has no pixels")
    turned = exif.get(ExifTags.Base.Orientation) in TURNED and picture.format != "TIFF"  # PIL turns those itself
    width, height = picture.size
    return (height, width) if turned else (width, height)
