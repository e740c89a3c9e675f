"""ControlNet Shuffle: the image, warped by a smooth random flow, as the control of a ControlNet.

    control(u) = image(f(u)),   f two smooth noises that span the image from edge to edge

The residuals are pooled over space, so they carry content and no layout, and they only enter the conditional half of
guidance. The flow covers the whole image whatever its proportions, and comes from the image's own seed, after the
starting noise. λ weights the residuals. Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion
Models", version 1.1; weights in lllyasviel/control_v11e_sd15_shuffle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ipa.errors import UserError
from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.prompt_tokens import StableDiffusionMethod, Start
from ipa.evaluation.methods.weights import controlnet_pipeline, load_base, load_controlnet
from ipa.families.stable_diffusion import StableDiffusion
from ipa.sampling import SamplingOptions
from ipa.weights import count_parameters

CELL_PX = 256  # distance of the noise's support points in pixels of the control


class ControlNetShuffle(StableDiffusionMethod):
    """A ControlNet that pools its residuals, given shuffled images; ``cell_px`` sets how smooth the flow is."""

    name = "controlnet_shuffle"
    uses_text = True
    rescales_guidance = False
    controlnet: Any

    def __init__(self, family: StableDiffusion, controlnet: Any, source: str = "", cell_px: int = CELL_PX) -> None:
        if not controlnet.config.global_pool_conditions:
            raise UserError(
                f"method.controlnet: {source or 'this ControlNet'} does not pool its residuals (global_pool_conditions "
                "in its config.json), so it was not trained on shuffled images: give "
                "lllyasviel/control_v11e_sd15_shuffle"
            )
        super().__init__(source, family=family, controlnet=controlnet)
        self.cell_px = cell_px

    @classmethod
    def from_pretrained(cls, base: str, controlnet: str, dtype: str = "float16") -> Self:
        """Raises MissingWeights, and UserError for another kind of ControlNet."""
        loaded = load_controlnet(controlnet, dtype)
        return cls(load_base(base, dtype), loaded, f"{controlnet} on {base}")

    @property
    def trained(self) -> int:
        return count_parameters(self.controlnet)

    def sample_latents(self, prompts: Sequence[Prompt], start: Start, sampling: SamplingOptions) -> Tensor:
        return self.call(
            controlnet_pipeline(self.family, self.controlnet),
            self.text_states(prompts),
            start,
            sampling,
            image=self.controls(prompts, start).to(self.family.device),
            controlnet_conditioning_scale=float(sampling.scale),
        )

    def controls(self, prompts: Sequence[Prompt], start: Start) -> Tensor:
        """Every image shuffled by its own generator: control_B3HW in [0, 1]."""
        pairs = zip(prompts, start.generators, strict=True)
        return torch.stack([shuffle(each.image_3HW, start.size_px, own, self.cell_px) for each, own in pairs])


def shuffle(image_3HW: Tensor, size_px: int, generator: torch.Generator, cell_px: int = CELL_PX) -> Tensor:
    """uint8 image of any size → float shuffled_3HW in [0, 1], square, sampled bilinearly from it."""
    flow_HW2 = torch.stack([smooth_noise(size_px, cell_px, generator) for _ in "xy"], -1) * 2 - 1
    picture = image_3HW[None].float() / 255
    return F.grid_sample(picture, flow_HW2[None], mode="bilinear", align_corners=True)[0].clamp(0, 1)


def smooth_noise(size_px: int, cell_px: int, generator: torch.Generator) -> Tensor:
    """noise_HW that spans [0, 1]: uniform numbers every ``cell_px``, bicubic between them.

    One more cell on each side is made and cut off, since interpolation is flat at the border.
    """
    cells, whole = size_px // cell_px + 2, size_px + 2 * cell_px
    numbers = torch.rand(1, 1, cells, cells, generator=generator)
    wide = F.interpolate(numbers, (whole, whole), mode="bicubic", align_corners=False)[0, 0]
    noise_HW = wide[cell_px : cell_px + size_px, cell_px : cell_px + size_px]
    low, high = noise_HW.aminmax()
    return (noise_HW - low) / (high - low)
