"""Text states in a feature cache: what text encoders made of the captions, so that training does not load them.

They are stored in bfloat16, or tokens' states in float8 (e4m3) with a scale for each token:

    x ≈ s q,     s = max |x| / 448

Tokens at the end that are zero are left out, and put back on reading. ``texts.safetensors``, next to the shards, has
the states of the few other texts that a training encodes, such as the empty one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ipa.data.cache.format import DAMAGED, SCALE, STATES, WrongCache, entries_of, in_json
from ipa.data.rejects import Rejected
from ipa.data.shards.opening import bytes_of, close_shard, open_shard
from ipa.types import TextInputs

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
TEXTS = "texts.safetensors"
ABOUT = "ipa texts"


def without_unread(states: TextInputs, mask_BL: Tensor | None) -> TextInputs:
    """Zeros in place of the tokens that a condition's mask leaves out."""
    if mask_BL is None:
        return states
    unread_BL1 = ~mask_BL.bool()[..., None]
    return {name: x.masked_fill(unread_BL1, 0) if x.ndim == 3 else x for name, x in states.items()}


def shapes_of(states: TextInputs) -> dict[str, list[int]]:
    return {name: list(x.shape[1:]) for name, x in states.items()}


def to_stored(states: TextInputs, kind: str) -> dict[str, Tensor]:
    """The states of a sample's captions under the names and in the types of the cache; ``kind`` is in ``KINDS``."""
    stored: dict[str, Tensor] = {}
    for name, x in states.items():
        if not x.is_floating_point():
            stored[f"{STATES}{name}"] = x.to(torch.int32)
        elif x.ndim < 3 or kind == "states":
            stored[f"{STATES}{name}"] = cut(x.to(torch.bfloat16))
        else:
            x_MLD = cut(x.float())
            scale_ML = x_MLD.abs().amax(-1) / LARGEST
            stored[f"{STATES}{name}"] = (x_MLD / scale_ML.clamp(min=torch.finfo().tiny)[..., None]).to(FP8)
            stored[f"{STATES}{name}{SCALE}"] = scale_ML
    return {name: x.contiguous() for name, x in stored.items()}


def cut(x: Tensor) -> Tensor:
    """M × L × D without the tokens at the end that are zero in all rows."""
    if x.ndim < 3:
        return x
    used_L = x.ne(0).any(-1).any(0)
    return x[:, : int(used_L.nonzero().max()) + 1 if used_L.any() else 0]


def from_stored(row: Mapping[str, NDArray[Any]], shapes: Mapping[str, Sequence[int]]) -> TextInputs:
    """One caption's states, of these shapes, from its arrays; raises ValueError or KeyError for others."""
    return {name: read_one(row, name, shape) for name, shape in shapes.items()}


def read_one(row: Mapping[str, NDArray[Any]], name: str, shape: Sequence[int]) -> Tensor:
    x = torch.from_numpy(row[f"{STATES}{name}"].copy())
    if x.dtype == torch.uint8:
        scale_L = torch.from_numpy(row[f"{STATES}{name}{SCALE}"].copy())
        x = (x.view(FP8).float() * scale_L[:, None]).to(torch.bfloat16)
    elif x.dtype == torch.uint16:
        x = x.view(torch.bfloat16)
    x = F.pad(x, (0, 0, 0, max(0, shape[0] - len(x)))) if x.ndim == 2 else x
    if list(x.shape) != list(shape):
        raise ValueError(f"{name} is {list(x.shape)}, not {list(shape)}")
    return x


@dataclass(frozen=True)
class Texts:
    """States of texts, and the fingerprint of the text encoders that made them."""

    encoder: str
    states: Mapping[str, TextInputs]

    def has(self, texts: Sequence[str]) -> bool:
        return all(text in self.states for text in texts)

    def written(self) -> bytes:
        rows = dict(enumerate(self.states.values()))
        tensors = {f"{number}.{name}": x.clone() for number, row in rows.items() for name, x in row.items()}
        return save(tensors, {ABOUT: in_json({"encoder": self.encoder, "texts": list(self.states)}).decode()})

    @classmethod
    def read(cls, place: str) -> Texts:
        """From a file or URL; raises ``WrongCache``."""
        try:
            file = open_shard(place)
            content = bytes_of(file).read()
            close_shard(file)
            about, _, _ = entries_of(content, ABOUT)
            rows: list[TextInputs] = [{} for _ in about["texts"]]
            for name, x in load(content).items():
                number, _, inner = name.partition(".")
                rows[int(number)][inner] = x
            return cls(str(about["encoder"]), dict(zip(about["texts"], rows, strict=True)))
        except (OSError, SafetensorError, Rejected, *DAMAGED) as error:
            raise WrongCache(
                f"{place} cannot be read ({error}): it has the states of the empty text and of preview.text. "
                "`python -m ipa.tools.precompute` writes it next to the shards; data.texts=FILE is another place"
            ) from error


def texts_next_to(shard: str) -> str:
    return f"{shard.rpartition('/')[0] or '.'}/{TEXTS}"


def known_in(folder: Path) -> Texts | None:
    """The texts of a cache's folder; None if there are none yet."""
    return Texts.read(str(folder / TEXTS)) if (folder / TEXTS).exists() else None
