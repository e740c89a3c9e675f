"""Uploads to the page: their limits, and the images of one job as files."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ipa.data.images.opening import picture_size, with_picture
from ipa.data.rejects import Reason, Rejected
from ipa.errors import UserError
from ipa.references import open_reference

MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
MAX_PICTURES = 8
MAX_TEXT_LENGTH = 2000
MAX_IMAGES = 24  # of one job
MAX_STEPS = 200
MAX_ENLARGEMENT = 2  # of the base's native size, in each direction


def check_picture(path: Path) -> None:
    """Raises UserError, which names the file as the user does: no picture, or broken. Gradio checks ``MAX_BYTES``."""
    too_many = f"{path.name} has more than {MAX_PIXELS // 10**6} million pixels: give a smaller picture"
    try:
        width, height = picture_size(path.read_bytes())
    except Rejected as error:
        unreadable = f"{path.name} cannot be read as a picture: {error.detail}"
        raise UserError(too_many if error.reason == Reason.TOO_MANY_PIXELS else unreadable) from error
    if width * height > MAX_PIXELS:
        raise UserError(too_many)
    try:
        open_reference(path)
    except UserError as error:
        raise UserError(f"{path.name} is damaged: its pixels cannot be read") from error


def check_pictures(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The pictures that can be used, and what is wrong with the others."""
    good, complaints = [], []
    for path in paths[:MAX_PICTURES]:
        try:
            check_picture(path)
            good.append(path)
        except UserError as error:
            complaints.append(str(error))
    if len(paths) > MAX_PICTURES:
        complaints.append(f"at most {MAX_PICTURES} pictures are used")
    return good, complaints


@dataclass
class Files:
    """The images of a job in its own folder, under the names in its command.

    ``made`` are those that the user does not have under this name.
    """

    folder: Path
    names: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    def add(self, path: str | None) -> str | None:
        """The name of a copy; raises UserError if it cannot be used as a picture."""
        if path is None:
            return None
        check_picture(Path(path))
        name = self.free(Path(path))
        (self.folder / name).write_bytes(Path(path).read_bytes())
        self.made += [name] if name != Path(path).name else []
        return name

    def add_mask(self, painted: str | None, size: tuple[int, int]) -> str | None:
        """White where something is painted, at the size of the images; None if nothing is."""
        opacity = read_opacity(painted) if painted else None
        if opacity is None or opacity.getextrema() == (0, 0):
            return None
        name = self.free(Path("mask.png"))
        mask = opacity.resize(size, Image.Resampling.BILINEAR).point(lambda value: 255 * (value > 127))
        mask.save(self.folder / name)
        self.made.append(name)
        return name

    def free(self, path: Path) -> str:
        """A plain, unique name: phones use the same names for many pictures."""
        stem, suffix = (
            re.sub(r"[^\w.-]+", "_", part) for part in (path.stem[:60].lstrip(".") or "picture", path.suffix)
        )
        found, number = f"{stem}{suffix}", 1
        while found in self.names:
            number += 1
            found = f"{stem}-{number}{suffix}"
        self.names.append(found)
        return found


def read_opacity(address: str) -> Image.Image:
    """Of what was painted in the browser, ``data:image/png;base64,…``, as grey."""
    try:
        data = base64.b64decode(address[:MAX_BYTES].partition(",")[2])
        width, height = picture_size(data)
        if width * height > MAX_PIXELS:
            raise UserError("the mask has too many pixels")
        return with_picture(data, lambda picture: picture.convert("RGBA").getchannel("A"))
    except (Rejected, ValueError) as error:
        raise UserError(f"the mask cannot be read: {error}") from error
