"""What the scripts of the demo world share: its pictures in memory, its tokenizer, checkpoints that survive a kill.

The pictures are few and small enough to be held in memory, which is what these scripts do; training an adapter goes
through the stream of ``ipa.data`` instead, as with any data set.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from make_data import BACKGROUNDS
from PIL import Image, ImageColor
from torch import Tensor

HERE = Path(__file__).resolve().parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE_PX = 64
TEXT_LENGTH = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
STYLE_WORDS = {"noto": "noto style", "fluent": "fluent style", "twemoji": "twemoji style"}
MORE_STYLE_WORDS = {"gradient": "gradient style", "blob": "blob style"}  # unknown to the judge
# index 0 is white, which half of all pictures have
COLOUR_NAMES = list(BACKGROUNDS)
COLOURS = torch.tensor([ImageColor.getrgb(colour) for colour in BACKGROUNDS.values()], dtype=torch.float32)


@dataclass
class World:
    """All pictures of a split: rgba_N4HW in uint8, and what is known of each."""

    rgba: Tensor
    captions: list[str]
    styles: list[str]
    concepts: list[str]
    backgrounds: list[str | None]

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device) -> World:
        return replace(self, rgba=self.rgba.to(device))

    def of_style(self, style: str | None) -> World:
        """Its pictures in one style; None keeps all."""
        kept = [i for i, each in enumerate(self.styles) if style in (None, each)]
        lists = (self.captions, self.styles, self.concepts, self.backgrounds)
        return World(self.rgba[kept], *([values[i] for i in kept] for values in lists))


def read_world(*folders: Path) -> World:
    """Read every shard of the folders in order; raises FileNotFoundError naming a folder without shards."""
    pictures, metadata = [], []
    for folder in folders:
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            raise FileNotFoundError(f"no shards in {folder}: run `python demo/make_data.py` first")
        for shard in shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    data = tar.extractfile(member).read()
                    if member.name.endswith(".webp"):
                        pictures.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")))
                    elif member.name.endswith(".json"):
                        metadata.append(json.loads(data))
    return World(
        rgba=torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(),
        captions=[m["caption"] for m in metadata],
        styles=[m["style"] for m in metadata],
        concepts=[m["concept"] for m in metadata],
        backgrounds=[m["background"] for m in metadata],
    )


def draw_backgrounds(count: int, generator: torch.Generator) -> Tensor:
    """Indices into ``BACKGROUNDS``: half white, half one of the colours."""
    colours = torch.randint(1, len(COLOURS), (count,), generator=generator)
    white = torch.rand(count, generator=generator) < 0.5
    return torch.where(white, 0, colours)


def compose(rgba_B4HW: Tensor, backgrounds_B: Tensor) -> Tensor:
    """Lay pictures on plain colours; returns pixels_B3HW in [-1, 1], on the pictures' device."""
    alpha = rgba_B4HW[:, 3:].float() / 255
    colour = COLOURS[backgrounds_B][:, :, None, None].to(alpha.device)
    return (rgba_B4HW[:, :3].float() * alpha + colour * (1 - alpha)) / 127.5 - 1


def describe(thing: str, style: str = "", background: int | None = None) -> str:
    """A caption of whatever is to be said, as "hatching chick noto style on red background".

    "" and None leave a part out.
    """
    manner = (STYLE_WORDS | MORE_STYLE_WORDS)[style] if style else ""
    ground = "" if background is None else f"on {COLOUR_NAMES[background]} background"
    return " ".join(part for part in (thing, manner, ground) if part)


def build_tokenizer(folder: Path, texts: list[str], vocabulary: int = 2000):
    """Train a CLIP tokenizer (byte-pair encoding with end-of-word marks) and save it into ``folder``.

    End-of-text gets the highest id, because open_clip pools the text there by argmax.
    """
    from transformers import CLIPTokenizer

    blank = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[])
    trained = json.loads(
        blank.train_new_from_iterator(texts, vocabulary).backend_tokenizer.to_str()  # type: ignore[attr-defined]
    )["model"]
    pieces = [piece for piece in sorted(trained["vocab"], key=trained["vocab"].get) if piece not in (BOS, EOS)]
    vocab = {piece: index for index, piece in enumerate([*pieces, BOS, EOS])}
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Save it for diffusers or open_clip, without the indentation that doubles its size."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")))


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise ValueError(text)
    return value


def positive_int(text: str) -> int:
    """An argparse type: 1, 2, …"""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint beside ``path`` and rename it, so that a kill leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, path)


class Clock:
    """Wall-clock budget in minutes across restarts, and when to report and to save."""

    def __init__(self, minutes: float, spent_s: float = 0.0, save_every_s: float = 120.0) -> None:
        self.limit_s = 60 * minutes
        self.start = time.monotonic() - spent_s
        self.save_every_s = save_every_s
        self.saved = time.monotonic()

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        """Part of the budget that is used, in [0, 1]."""
        return min(self.spent_s / self.limit_s, 1.0)

    def time_to_save(self) -> bool:
        if time.monotonic() - self.saved < self.save_every_s:
            return False
        self.saved = time.monotonic()
        return True
