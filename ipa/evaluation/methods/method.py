"""The contract of a compared system: image prompts in, images out, the same images for the same seeds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ipa.data.images.transforms import Opened, fit_reference
from ipa.errors import UserError
from ipa.sampling import SamplingOptions


@dataclass(frozen=True)
class Prompt:
    """An image prompt as uint8 image_3HW (RGB, any size), a text (may be empty), and the generated image's seed."""

    image_3HW: Tensor
    text: str
    seed: int

    def cut(self, size_px: int, fit: str = "crop") -> Tensor:
        """The square that an encoder reads, uint8 image_3HW; ``fit`` is a name in ``transforms.FITS``."""
        height, width = self.image_3HW.shape[-2:]
        return fit_reference(Opened(self.image_3HW, (width, height), (width, height)), size_px, fit)


class Method(nn.Module, ABC):
    """A frozen system: its parts are in eval mode and have no gradients.

    ``uses_text`` says whether the prompt's text has any effect, ``rescales_guidance`` whether the system's pipeline has
    ``guidance_rescale``; ``source`` is where the weights were loaded from, ``recorded`` more about them for the
    manifest. Each image's noise comes from its own seed, drawn on the CPU, so that it is the same on every device.
    """

    name: ClassVar[str]
    uses_text: ClassVar[bool]
    rescales_guidance: ClassVar[bool] = False
    recorded: Mapping[str, Any] = {}

    def __init__(self, source: str, **parts: nn.Module) -> None:
        super().__init__()
        self.source = source
        for name, part in parts.items():
            self.add_module(name, part)
        self.eval().requires_grad_(False)

    @property
    @abstractmethod
    def trained(self) -> int | None:
        """Number of parameters trained for image prompts, as the paper's table counts them; None if unknown."""

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], sampling: SamplingOptions) -> Tensor:
        """Pixels in [-1, 1] up to rounding, of any float type, on any device."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingOptions) -> Tensor:
        """pixels_B3HW in [-1, 1], float32 on the CPU, all of one size. Raises UserError for what it cannot sample."""
        self.check(sampling)
        return self.sample(prompts, sampling).float().cpu().clamp(-1, 1)

    @classmethod
    def check(cls, sampling: SamplingOptions) -> None:
        """Raise UserError for options that the system does not have; a system without λ ignores it."""
        if sampling.guidance_rescale and not cls.rescales_guidance:
            raise UserError(
                f"sampling.guidance_rescale={sampling.guidance_rescale}: the pipeline of {cls.name} has no "
                "guidance_rescale, give 0"
            )

    def pipeline_arguments(self, sampling: SamplingOptions, size_px: int) -> dict[str, Any]:
        """The options under the names that all pipelines of diffusers share."""
        arguments = {"num_inference_steps": sampling.num_steps, "guidance_scale": sampling.guidance}
        rescale = {"guidance_rescale": sampling.guidance_rescale} if self.rescales_guidance else {}
        return {**arguments, **rescale, "height": size_px, "width": size_px}


def make_generators(prompts: Sequence[Prompt]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]


def draw_start(prompts: Sequence[Prompt], shape_CHW: tuple[int, ...]) -> tuple[Tensor, list[torch.Generator]]:
    """Starting noise_BCHW, each image's from its own seed, and the generators for what is drawn after it."""
    generators = make_generators(prompts)
    return torch.stack([torch.randn(shape_CHW, generator=generator) for generator in generators]), generators
