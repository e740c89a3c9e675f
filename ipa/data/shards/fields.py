"""The members of one sample: its picture, texts and metadata, each parsed only when it is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ipa.data.images.transforms import Size, picture_size
from ipa.data.rejects import BROKEN_METADATA, NO_PICTURE, TOO_LARGE, Rejected

# the extensions of a sample's picture, the preferred one first; a folder's pictures are ``files.PICTURE_EXTENSIONS``
PICTURE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
METADATA = "json"
ENTRY = f"{METADATA}."  # begins the key of an entry of the metadata: json.NAME
MAX_TEXT_BYTES, MAX_METADATA_BYTES = 1 << 20, 1 << 24


class Fields:
    """One sample: extension → content. ``references`` are not its own picture. All properties raise ``Rejected``."""

    def __init__(self, members: Mapping[str, bytes], references: Sequence[str] = ()) -> None:
        self.members, self.references = members, references

    @cached_property
    def picture(self) -> bytes:
        for extension in PICTURE_MEMBERS:
            if extension in self.members and extension not in self.references:
                return self.members[extension]
        raise Rejected(NO_PICTURE)

    @cached_property
    def size(self) -> Size:
        """Width and height of the picture, see ``picture_size``."""
        return picture_size(self.picture)

    @property
    def known_size(self) -> Size | None:
        """The size if it was needed before."""
        return self.__dict__.get("size")

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Empty without a JSON member."""
        try:
            entries = json.loads(self.text(METADATA, MAX_METADATA_BYTES) if METADATA in self.members else "{}")
        except (ValueError, RecursionError) as error:
            raise Rejected(BROKEN_METADATA, str(error)) from error
        if not isinstance(entries, dict):
            raise Rejected(BROKEN_METADATA, f"a {type(entries).__name__}, expected an object")
        return entries

    def text(self, extension: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
        """A member's text; may raise UnicodeDecodeError."""
        if len(self.members[extension]) > max_bytes:
            raise Rejected(TOO_LARGE, f"{extension}: {len(self.members[extension]):,} bytes of text")
        return self.members[extension].decode()
