"""ControlNet Shuffle: the picture, its content moved about by a smooth random flow, as the control of a ControlNet.

    control(u) = picture(f(u)),   f two smooth noises that reach from edge to edge of the picture

The residuals are pooled over space, so that only content is told and no layout, and they go to the conditional half of
guidance alone. The flow takes the whole picture whatever its proportions, and is the picture's own: it comes from the
generator of its seed, behind the starting noise. λ weighs the residuals. Zhang et al. 2023, "Adding Conditional Control
to Text-to-Image Diffusion Models", version 1.1; weights in lllyasviel/control_v11e_sd15_shuffle.

    method = ControlNetShuffle.from_pretrained()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import Tensor

from ipa.errors import UserError, brief
from ipa.evaluation.methods.method import Prompt, Sampling
from ipa.evaluation.methods.prompt_tokens import StableDiffusionMethod, count_parameters, load_base, tell_missing
from ipa.families.latent_diffusion import to_dtype
from ipa.families.stable_diffusion import StableDiffusion

CELL_PX = 256  # distance of the noise's support points in pixels of the control


class ControlNetShuffle(StableDiffusionMethod):
    """A ControlNet that pools its residuals, given shuffled pictures; ``cell_px`` is how smooth the flow is."""

    name = "controlnet_shuffle"
    uses_text = True

    def __init__(self, family: StableDiffusion, controlnet: Any, source: str = "", cell_px: int = CELL_PX) -> None:
        super().__init__(family, source)
        if not controlnet.config.global_pool_conditions:
            raise UserError(
                f"method.controlnet: {source or 'this ControlNet'} does not pool its residuals (global_pool_conditions "
                "in its config.json), so it is not the one for shuffled pictures: lllyasviel/control_v11e_sd15_shuffle"
            )
        self.controlnet, self.cell_px = controlnet, cell_px
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        controlnet: str = "lllyasviel/control_v11e_sd15_shuffle",
        dtype: str = "float16",
    ) -> Self:
        """Raises MissingWeights for what is neither here nor to be had, ValueError for another kind of ControlNet."""
        loaded = load_controlnet(controlnet, dtype)
        return cls(load_base(base, dtype), loaded, f"{controlnet} on {base}")

    @property
    def trained(self) -> int:
        return count_parameters(self.controlnet)

    def sample(self, prompts: Sequence[Prompt], noise_BCHW: Tensor, sampling: Sampling) -> Tensor:
        arguments = self.arguments(*self.text_states(prompts), noise_BCHW, sampling)
        control_B3HW = self.controls(prompts, noise_BCHW.shape[1:], arguments["height"])
        return (
            self.pipeline()(
                **arguments,
                image=control_B3HW.to(self.family.device),
                controlnet_conditioning_scale=float(sampling.scale),
            )
        ).images

    def controls(self, prompts: Sequence[Prompt], latent_shape: Sequence[int], size_px: int) -> Tensor:
        """Every picture shuffled by its own seed: control_B3HW in [0, 1]."""
        made = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(prompt.seed)
            torch.randn(tuple(latent_shape), generator=generator)  # the starting noise is drawn from the same seed
            made.append(shuffle(prompt.image_3HW, size_px, generator, self.cell_px))
        return torch.stack(made)

    def pipeline(self) -> Any:
        return self.family.pipeline(StableDiffusionControlNetPipeline, controlnet=self.controlnet)


def load_controlnet(path: str, dtype: str) -> Any:
    """Raises MissingWeights when it is not to be had, ValueError when weights are missing in it."""
    torch_dtype = to_dtype(dtype, "method.dtype")
    try:
        controlnet, info = ControlNetModel.from_pretrained(path, dtype=torch_dtype, output_loading_info=True)
    except OSError as error:
        raise tell_missing(error, path, "method.controlnet") from error
    except Exception as error:  # diffusers lets through what breaks in a file
        raise UserError(f"method.controlnet={path} is not a ControlNet: {brief(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"method.controlnet={path}: {len(missing)} weights are missing, {missing[0]} among them")
    return controlnet


def shuffle(image_3HW: Tensor, size_px: int, generator: torch.Generator, cell_px: int = CELL_PX) -> Tensor:
    """uint8 picture of any size → float shuffled_3HW in [0, 1], square: every pixel is one of the picture, bilinear."""
    flow_HW2 = torch.stack([smooth_noise(size_px, cell_px, generator) for _ in "xy"], -1) * 2 - 1
    picture = image_3HW[None].float() / 255
    return F.grid_sample(picture, flow_HW2[None], mode="bilinear", align_corners=True)[0].clamp(0, 1)


def smooth_noise(size_px: int, cell_px: int, generator: torch.Generator) -> Tensor:
    """noise_HW of which the least is 0 and the most 1: uniform numbers every ``cell_px``, bicubic between them.

    A cell more on each side is made and cut off, where the interpolation would level out.
    """
    cells, whole = size_px // cell_px + 2, size_px + 2 * cell_px
    numbers = torch.rand(1, 1, cells, cells, generator=generator)
    wide = F.interpolate(numbers, (whole, whole), mode="bicubic", align_corners=False)[0, 0]
    noise_HW = wide[cell_px : cell_px + size_px, cell_px : cell_px + size_px]
    low, high = noise_HW.aminmax()
    return (noise_HW - low) / (high - low)
