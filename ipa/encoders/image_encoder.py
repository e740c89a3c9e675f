"""Base class of image encoders: frozen weights in their own precision, normalisation, widths, the blank image.

A subclass loads a network and runs it in ``forward``. It declares no widths: the network runs once on torch's meta
device, which computes shapes without weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ipa import contracts
from ipa.contracts import Uses
from ipa.errors import MissingWeights, UserError, brief
from ipa.types import EncoderWidths, Features
from ipa.weights import fingerprint

PENULTIMATE = -2


class ImageEncoder(contracts.ImageEncoder):
    """A frozen network that reads square images of ``image_size_px``.

    ``source`` and ``weights`` identify it in an adapter's metadata (see `ipa.encoders.open_encoder`). ``layer`` is the
    block whose output the patch features are, counted from the end: -1 is the last one, -2 the default. ``widths``
    holds 0 for features that the network does not have; asking for them raises UserError.
    """

    visual: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        visual: nn.Module,
        image_size_px: int,
        mean: Sequence[float],
        std: Sequence[float],
        source: str = "",
        weights: str | None = None,
        layer: int = PENULTIMATE,
    ) -> None:
        super().__init__()
        self.visual = visual
        self.source, self.weights, self.layer = source, weights, layer
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)
        self.widths = self._measure(image_size_px)

    @classmethod
    def make_hollow(cls, *args: Any, **options: Any) -> Self:
        """On the meta device, without weights; takes the arguments of ``from_pretrained`` and raises as it does."""
        raise MissingWeights(f"{cls.__name__} cannot be described without its weights")

    @classmethod
    def read_widths(cls, *args: Any, **options: Any) -> EncoderWidths:
        """Widths from the configuration alone; takes the arguments of ``from_pretrained`` and raises as it does."""
        return cls.make_hollow(*args, **options).widths

    @abstractmethod
    def forward(self, normalized_B3HW: Tensor, uses: Uses) -> Tensor | None:
        """Features of normalised pixels: pooled_BE or patches_BPF, None if the network has none of these.

        ``pooled`` is the embedding as the network gives it, not normalised. ``patches`` are the hidden states after
        block ``layer``, class and register tokens first, if there are any.
        """

    def _measure(self, image_size_px: int) -> EncoderWidths:
        if self.layer >= 0:
            raise UserError(f"encoder.layer={self.layer}: give a negative number, -1 is the network's last block")
        tensors = {name: tensor.to("meta") for name, tensor in [*self.named_parameters(), *self.named_buffers()]}
        dtype = next(self.visual.parameters()).dtype
        image = torch.empty(1, 3, image_size_px, image_size_px, dtype=dtype, device="meta")
        try:
            pooled_BE, patches_BPF = (
                torch.func.functional_call(self, tensors, (image, uses)) for uses in ("pooled", "patches")
            )
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the encoder {self.source} cannot be run on images of {image_size_px} px with "
                f"encoder.layer={self.layer}: {brief(error)}"
            ) from error
        num_patches, patch_width = (0, 0) if patches_BPF is None else patches_BPF.shape[1:]
        return EncoderWidths(0 if pooled_BE is None else pooled_BE.shape[1], patch_width, num_patches, image_size_px)

    def width(self, uses: Uses) -> int:
        """Width of the features that a head ``uses``: E or F. Raises UserError if the network does not have them."""
        width = {"pooled": self.widths.pooled, "patches": self.widths.patch}[uses]
        if not width:
            head = {"pooled": "fine_grained", "patches": "global"}[uses]
            raise UserError(f"the encoder {self.source} has no {uses} features: use tokens={head} or another encoder")
        return width

    def fingerprint(self) -> str:
        return fingerprint(self) + ("" if self.layer == PENULTIMATE else f" layer {self.layer}")

    def layer_name(self, uses: Uses) -> str:
        return "projected" if uses == "pooled" else layer_name(self.layer)

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor, uses: Uses = "pooled") -> Features:
        return self._run(((image_B3HW.float() + 1) / 2 - self.mean) / self.std, uses)

    @torch.no_grad()
    def blank(self, batch: int, uses: Uses = "pooled") -> Features:
        """Features of an image of zeros after normalisation: "no image" for the published fine-grained adapters."""
        features = self._run(self.mean.new_zeros(1, 3, self.image_size_px, self.image_size_px), uses)
        return features.map(lambda x: x.expand(batch, *x.shape[1:]))

    def _run(self, normalized_B3HW: Tensor, uses: Uses) -> Features:
        """Run in the weights' own precision even inside autocast, so that features do not depend on the caller."""
        self.width(uses)
        dtype = next(self.visual.parameters()).dtype
        with torch.autocast(normalized_B3HW.device.type, enabled=False):
            features = self(normalized_B3HW.to(dtype), uses)
        return Features(pooled_BE=features) if uses == "pooled" else Features(patches_BPF=features)


def layer_name(layer: int) -> str:
    """``penultimate`` for the default, as in published metadata, else the number."""
    return "penultimate" if layer == PENULTIMATE else str(layer)


def read_layer(name: str | None) -> int:
    """The inverse of ``layer_name``; the default if the metadata does not say. Raises UserError."""
    if name in (None, "", "projected", layer_name(PENULTIMATE)):
        return PENULTIMATE
    try:
        return int(str(name))
    except ValueError:
        raise UserError(f"the metadata says layer={name}: expected penultimate or a negative number") from None


def square_edge(size: int | Sequence[int], source: str) -> int:
    """The edge of an image whose size is given as a number or as height and width; raises UserError if not square."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(f"the encoder {source} reads images of {height} × {width}; ipa crops square ones only")
    return height
