"""A picture of the folder → the members of its sample: metadata, caption, picture, and a reference if there is one."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from ipa.data.images.transforms import open_header, picture_size
from ipa.data.rejects import BROKEN_PICTURE, Rejected
from ipa.tools.packing.folders import Stamp, ending

NOT_SHRUNK = "broken picture, cannot be shrunk"
REFERENCE = "ref"  # KEY.ref.jpg
JPEG_QUALITY = 95
REDUCING_GAP = 3  # a cheap first step of resizing leaves this many times the wanted size


@dataclass(frozen=True)
class Sample:
    """A picture that is to be packed: ``name`` is its path in the folder, ``reference`` one in the other folder."""

    key: str
    name: str
    stamp: Stamp
    captions: tuple[str, ...]
    others: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    reference_stamp: Stamp | None = None


@dataclass(frozen=True)
class Making:
    """How samples become members: pictures are copied, or shrunk where their shortest side is above ``size_px``.

    ``all_captions`` puts them into the metadata of every sample, for folders where some have several.
    """

    folder: Path
    references: Path | None = None
    size_px: int | None = None
    all_captions: bool = False

    def members(self, sample: Sample) -> dict[str, bytes]:
        """Extension → content, in the order in which they are written; raises ``Rejected``."""
        original = Picture.read(self.folder / sample.name)
        picture = original.shrunk(self.size_px)
        members = {
            "json": json.dumps(self.metadata(sample, picture.size, original.size), default=str).encode(),
            "txt": caption_of(sample).encode(),
            picture.ending: picture.data,
        }
        if self.references and sample.reference:
            reference = Picture.read(self.references / sample.reference).shrunk(self.size_px)
            members[f"{REFERENCE}.{reference.ending}"] = reference.data
        return members

    def metadata(self, sample: Sample, size: tuple[int, int], original: tuple[int, int]) -> dict[str, Any]:
        """img2dataset's entries and the table's; the table's count where both have one, unless it can be measured."""
        entries: dict[str, Any] = {"key": sample.key, "status": "success", "caption": caption_of(sample)}
        entries |= {"file_name": sample.name} | ({"captions": sample.captions} if self.all_captions else {})
        entries |= {name: finite(value) for name, value in sample.others.items()}
        measured = {"width": size[0], "height": size[1], "original_width": original[0], "original_height": original[1]}
        return entries | {"key": sample.key} | measured


def caption_of(sample: Sample) -> str:
    """The one in KEY.txt; empty without any."""
    return sample.captions[0] if sample.captions else ""


def finite(value: Any) -> Any:
    """JSON has no word for what is not a number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Picture:
    """The bytes of a picture, the ending of its name, and width and height as it is seen, upright."""

    data: bytes
    ending: str
    size: tuple[int, int]

    @classmethod
    def read(cls, path: Path) -> Picture:
        """Looks at the header alone; raises ``Rejected``."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise Rejected(BROKEN_PICTURE, str(error)) from error
        return cls(data, ending(path.name), picture_size(data))

    def shrunk(self, size_px: int | None) -> Picture:
        """With the shortest side at most ``size_px``, encoded anew; or itself. Raises ``Rejected``."""
        if size_px is None or min(self.size) <= size_px:
            return self
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata, and of sizes that training decides on
                return encoded(resized(open_header(self.data), size_px / min(self.size)))
        except Exception as error:  # a decoder on damaged bytes raises nearly anything
            raise Rejected(NOT_SHRUNK, repr(error)) from error


def resized(picture: Image.Image, scale: float) -> Image.Image:
    """Upright and smaller, RGB or RGBA."""
    if not isinstance(picture, JpegImageFile):
        picture.load()  # what may turn it; JPEG waits, since it can decode to a half, a quarter … of its size
    width, height = (max(1, round(side * scale)) for side in picture.size)
    drafted = picture.draft(None, (width * REDUCING_GAP, height * REDUCING_GAP))
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    if picture.mode != mode:
        picture = picture.convert(mode)
        picture.info.pop("icc_profile", None)  # of the colours that were
    box = drafted[1] if drafted else None
    small = picture.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=REDUCING_GAP)
    return ImageOps.exif_transpose(small)


def encoded(picture: Image.Image) -> Picture:
    """Lossless WebP where there is transparency, else JPEG."""
    out = io.BytesIO()
    profile = picture.info.get("icc_profile")
    if picture.mode == "RGBA":
        picture.save(out, "WEBP", lossless=True, icc_profile=profile)
        return Picture(out.getvalue(), "webp", picture.size)
    picture.save(out, "JPEG", quality=JPEG_QUALITY, icc_profile=profile)
    return Picture(out.getvalue(), "jpg", picture.size)
