"""Shards as they come from the web: mostly sound, with every kind of dirt, and the list of what is good in them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tars import Members, bomb, saved, write_tar

SIDE_PX = 48


@dataclass
class Content:
    """Keys of the good samples in file order, and the rejects that must be counted."""

    good: list[str] = field(default_factory=list)
    rejects: Counter[str] = field(default_factory=Counter)


def jpeg(draw: random.Random, mode: str = "RGB") -> bytes:
    """A small picture of its own: 4 × 4 random colours, enlarged."""
    small = Image.frombytes(mode, (4, 4), draw.randbytes(16 * len(mode)))
    return saved(small.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC), "JPEG", quality=90)


def animation(draw: random.Random) -> bytes:
    frames = [Image.frombytes("RGB", (4, 4), draw.randbytes(48)).resize((SIDE_PX, SIDE_PX)) for _ in range(3)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


HTML = b"<!DOCTYPE html><html><body>403 Forbidden</body></html>"
TEXT = b"a picture of a thing"
BROKEN = "broken picture"

# kind → members of a sample with this key, and the reason that it is rejected with; None: it is good all the same
KINDS: dict[str, tuple[object, str | None]] = {
    "truncated JPEG": (lambda k, d: [(f"{k}.jpg", jpeg(d)[:-200]), (f"{k}.txt", TEXT)], BROKEN),
    "zero bytes": (lambda k, d: [(f"{k}.jpg", b""), (f"{k}.txt", TEXT)], BROKEN),
    "HTML": (lambda k, d: [(f"{k}.jpg", HTML), (f"{k}.txt", TEXT)], BROKEN),
    "wrong extension": (lambda k, d: [(f"{k}.dat", jpeg(d)), (f"{k}.txt", TEXT)], "no picture"),
    "no caption": (lambda k, d: [(f"{k}.jpg", jpeg(d))], "no caption"),
    "empty caption": (lambda k, d: [(f"{k}.jpg", jpeg(d)), (f"{k}.txt", b" \n")], "empty caption"),
    "not UTF-8": (lambda k, d: [(f"{k}.jpg", jpeg(d)), (f"{k}.txt", b"caf\xe9")], "caption is not UTF-8"),
    "bomb": (lambda k, d: [(f"{k}.png", bomb()), (f"{k}.txt", TEXT)], "too many pixels"),
    "CMYK": (lambda k, d: [(f"{k}.jpg", jpeg(d, "CMYK")), (f"{k}.txt", TEXT)], None),
    "animation": (lambda k, d: [(f"{k}.gif", animation(d)), (f"{k}.txt", TEXT)], None),
    "PNG named JPEG": (lambda k, d: [(f"{k}.jpg", png_bytes(d)), (f"{k}.txt", TEXT)], None),
    "caption only": (lambda k, d: [(f"{k}.txt", TEXT)], "no picture"),
}


def png_bytes(draw: random.Random) -> bytes:
    return saved(Image.frombytes("RGB", (16, 16), draw.randbytes(768)), "PNG")


def sample(key: str, draw: random.Random, dirty: bool, content: Content) -> Members:
    """The members of one sample; notes in ``content`` what must become of it."""
    if not dirty:
        content.good.append(key)
        return [(f"{key}.jpg", jpeg(draw)), (f"{key}.txt", f"thing {key}".encode()), (f"{key}.json", b'{"width": 48}')]
    make, reason = KINDS[draw.choice(list(KINDS))]
    if reason is None:
        content.good.append(key)
    else:
        content.rejects[reason] += 1
    return make(key, draw)  # type: ignore[operator]


def write_dirty_shard(path: Path, number: int, samples: int, share: float = 0.03, broken: bool = False) -> Content:
    """A shard whose samples are dirty with this probability, its duplicates besides; ``broken``: in the middle."""
    draw, content = random.Random(number), Content()
    members: Members = []
    for i in range(samples):
        key = f"{number:05d}{i:05d}"
        members += sample(key, draw, draw.random() < share, content)
        if draw.random() < share / 10 and content.good:
            members += [(f"{content.good[0]}.jpg", jpeg(draw)), (f"{content.good[0]}.txt", b"the same key again")]
            content.rejects["duplicate key"] += 1
        if broken and i == samples // 2:
            # a bad sample just before the break would count as a part of it, since it may be incomplete
            members += sample(f"{key}x", draw, False, content)
            return break_off(path, members, content)
    write_tar(path, members)
    return content


def break_off(path: Path, members: Members, content: Content) -> Content:
    """After these samples a header is damaged: they are good, nothing behind can be read."""
    write_tar(path, [*members, ("behind.jpg", b"x" * 5000), ("behind.txt", b"lost")])
    blocks = path.read_bytes()
    at = sum(512 + -(-len(member) // 512) * 512 for _, member in members)
    path.write_bytes(blocks[:at] + b"\xff" * 512 + blocks[at + 512 :])
    content.rejects["broken tar"] += 1
    return content
