"""The scoring network: an open_clip model that never conditions what it scores."""

from __future__ import annotations

import functools
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipa.encoders.open_clip import resolve_name


class ClipScorer(nn.Module):
    """Unit-length image and text embeddings of an open_clip model; pixels of any size in [-1, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Any, tokenizer: Any, preprocess: dict[str, Any], name: str = "") -> None:
        super().__init__()
        self.clip, self.tokenizer, self.name = clip, tokenizer, name
        size = preprocess["size"]
        self.image_size_px = size if isinstance(size, int) else size[0]
        self.register_buffer("mean", torch.tensor(preprocess["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocess["std"])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, name: str, pretrained: str | None = None) -> Self:
        """``name`` as open_clip has it: built-in, ``hf-hub:…`` or ``local-dir:FOLDER``.

        Raises OSError when the weights cannot be had.
        """
        import open_clip

        name = resolve_name(name)
        options: dict[str, Any] = {"pretrained": pretrained, "precision": "fp32"}
        try:
            clip = open_clip.create_model(name, **options, require_pretrained=True, weights_only=True)
        except RuntimeError as error:  # open_clip's word for a download that failed
            raise OSError(
                f"judge.name={name} judge.pretrained={pretrained}: {str(error).splitlines()[0]} Give a folder with "
                "judge.name=local-dir:FOLDER judge.pretrained=null, or do without scores: judge=null"
            ) from error
        return cls(clip, open_clip.get_tokenizer(name), open_clip.get_model_preprocess_cfg(clip), name)

    @torch.no_grad()
    def embed_images(self, pixels_B3HW: Tensor, batch_size: int = 64) -> Tensor:
        """embedding_BE of length one; bicubic resize of the shortest side, then centre crop, as CLIP reads pictures."""
        pieces = [self._embed(piece) for piece in pixels_B3HW.split(batch_size)]
        return torch.cat(pieces)

    def _embed(self, pixels_B3HW: Tensor) -> Tensor:
        pixels = (pixels_B3HW.to(self.mean.device, torch.float32) + 1) / 2
        normalized = (fit_square(pixels, self.image_size_px) - self.mean) / self.std
        return F.normalize(self.clip.encode_image(normalized), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """embedding_BE of length one."""
        return F.normalize(self.clip.encode_text(self.tokenizer(texts).to(self.mean.device)), dim=-1)


@functools.cache
def load_scorer(name: str, pretrained: str | None = None) -> ClipScorer:
    """One scorer per name and process, shared by all who score."""
    return ClipScorer.from_pretrained(name, pretrained)


def fit_square(pixels_B3HW: Tensor, size_px: int) -> Tensor:
    """Shortest side to ``size_px`` with antialias, then the centre."""
    height, width = pixels_B3HW.shape[-2:]
    if (height, width) == (size_px, size_px):
        return pixels_B3HW
    factor = size_px / min(height, width)
    sides = (max(size_px, round(height * factor)), max(size_px, round(width * factor)))
    resized = F.interpolate(pixels_B3HW, sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (sides[0] - size_px) // 2, (sides[1] - size_px) // 2
    return resized[..., top : top + size_px, left : left + size_px]
