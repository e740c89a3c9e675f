"""What all image encoders share: frozen weights in their own precision, normalisation, the blank picture.

A subclass loads a network, tells its ``EncoderWidths`` and runs it in ``_features``.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ipa import contracts
from ipa.contracts import Uses
from ipa.errors import UserError
from ipa.types import EncoderWidths, Features

DTYPES = ("float32", "bfloat16", "float16")


class ImageEncoder(contracts.ImageEncoder):
    """A frozen network that reads square pictures.

    ``source`` and ``weights`` are what finds it again (`ipa.encoders.open_encoder`). ``widths`` says 0 for patches
    where the network has none; asking for them raises UserError.
    """

    visual: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        visual: nn.Module,
        widths: EncoderWidths,
        mean: list[float],
        std: list[float],
        source: str = "",
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.visual, self.widths = visual, widths
        self.source, self.weights = source, weights
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever the trainer asks."""
        return super().train(False)

    @property
    def pooled_width(self) -> int:
        return self.width("pooled")

    @property
    def patch_width(self) -> int:
        return self.width("patches")

    def width(self, uses: Uses) -> int:
        """Width of the features that a head ``uses``: E or F."""
        if uses == "pooled":
            return self.widths.pooled
        if not self.widths.patch:
            raise UserError(
                f"the encoder {self.source} gives a pooled embedding but no patch features with a class token: choose "
                "a vision transformer of OpenAI's kind such as ViT-H-14, or a head that reads the pooled embedding"
            )
        return self.widths.patch

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor, uses: Uses = "pooled") -> Features:
        """Pixels in [-1, 1] at ``image_size_px`` → the features that the head ``uses``, in the weights' precision."""
        return self._run(((image_B3HW.float() + 1) / 2 - self.mean) / self.std, uses)

    @torch.no_grad()
    def blank(self, batch: int, uses: Uses = "pooled") -> Features:
        """What the published fine-grained weights take for "no image": a picture of zeros after normalisation."""
        features = self._run(self.mean.new_zeros(1, 3, self.image_size_px, self.image_size_px), uses)
        return Features(expand(features.pooled_BE, batch), expand(features.patches_BPF, batch))

    def _run(self, normalized_B3HW: Tensor, uses: Uses) -> Features:
        """In the weights' own precision, whatever autocast is on around it: features must not depend on the caller."""
        self.width(uses)
        dtype = next(self.visual.parameters()).dtype
        with torch.autocast(normalized_B3HW.device.type, enabled=False):
            return self._features(normalized_B3HW.to(dtype), uses)

    def _features(self, normalized_B3HW: Tensor, uses: Uses) -> Features:
        raise NotImplementedError


def expand(features: Tensor | None, batch: int) -> Tensor | None:
    return None if features is None else features.expand(batch, *features.shape[1:])


def read_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"encoder.dtype={name}: one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """A size given as a number or as height and width → height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def square_edge(size: int | list[int] | tuple[int, ...], source: str) -> int:
    """The edge of a picture whose size stands as a number or as height and width; raises UserError if not square."""
    height, width = pair(size)
    if height != width:
        raise UserError(f"the encoder {source} reads pictures of {height} × {width}; only square ones are cropped here")
    return height
