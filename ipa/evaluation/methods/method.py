"""What every compared system promises: pictures from image prompts, the same for the same seeds.

method = SomeMethod.from_pretrained("owner/name", dtype="float16")
pixels_B3HW = method.generate([Prompt(image_3HW, "", seed=0)], Sampling(num_steps=50, guidance=7.5))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ipa.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """An image prompt: the whole picture as uint8 image_3HW (RGB, any size), a text (empty for none), and a seed."""

    image_3HW: Tensor
    text: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How pictures are made. ``guidance`` as in diffusers (1 means none), ``scale`` is λ where a system has one.

    ``image_size_px`` is the edge of the square pictures; None is what the system was made for.
    """

    num_steps: int = 50
    guidance: float = 7.5
    scale: float = 1.0
    image_size_px: int | None = None


class MissingWeights(UserError):
    """Weights that are neither here nor to be had: the message says what to download and where to put it."""


class Method(Protocol):
    """A system with its weights. ``uses_text`` says whether a prompt's text plays a part at all.

    Each picture's randomness comes from its own seed alone: from CPU generators, so that every device starts alike.
    ``source`` names the weights, ``trained`` counts the parameters that were trained for image prompts (the paper's
    column; None where that is not known from the modules).
    """

    name: ClassVar[str]
    uses_text: ClassVar[bool]
    source: str

    @property
    def trained(self) -> int | None: ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
        """pixels_B3HW in [-1, 1], float32 on the CPU, all of one size."""
        ...

    def to(self, device: Any) -> Method: ...
