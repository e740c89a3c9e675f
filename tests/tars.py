"""Archives of given members, and the smallest samples."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def png(size: tuple[int, int] = (10, 8), colour: str | tuple[int, ...] = "teal", mode: str = "RGB") -> bytes:
    return saved(Image.new(mode, size, colour), "PNG")


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG that claims to have so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(bytes(100)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in chunks.items())


def noise_picture(width: int, height: int, least: int = 0, most: int = 255) -> Image.Image:
    pixels = np.random.default_rng(0).integers(least, most + 1, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def good(key: str, caption: str = "a thing") -> Members:
    return [(f"{key}.json", b"{}"), (f"{key}.txt", caption.encode()), (f"{key}.png", png())]
