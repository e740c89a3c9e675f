"""Versatile Diffusion: a diffusion model with an image flow and a text flow, trained from scratch (Xu et al. 2022).

The context of the image flow is all 257 tokens of CLIP ViT-L/14, projected and divided by the class token's norm;
"no image" is the same of a grey image. ``Versatile`` is image variation. ``VersatileDual`` runs every attention layer
of both flows and mixes their residuals:

    h + w · (text layer(h) - h) + (1 - w) · (image layer(h) - h),   also where the text is empty

Weights of both in shi-labs/versatile-diffusion.

Two bugs of diffusers are fixed here, in our pipelines only: its grey is a float image of 0.5 that CLIP's processor
divides by 255, which makes it almost black; and its UNet passes an ``encoder_attention_mask`` to every attention layer,
which the layers of the dual flow do not accept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import VersatileDiffusionDualGuidedPipeline, VersatileDiffusionImageVariationPipeline
from diffusers.models import DualTransformer2DModel
from PIL import Image
from torch import Tensor

from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.pipelines import LatentPipelineMethod, to_pil
from ipa.sampling import SamplingOptions
from ipa.weights import count_parameters

DUAL: Any = VersatileDiffusionDualGuidedPipeline  # typed as a placeholder in diffusers
GREY = Image.new("RGB", (512, 512), (128, 128, 128))


class Versatile(LatentPipelineMethod):
    """A ``VersatileDiffusionImageVariationPipeline``: only the image flow."""

    name = "versatile"
    uses_text = False
    pipeline_class = VersatileDiffusionImageVariationPipeline
    unet_name = "image_unet"

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingOptions) -> Tensor:
        return self.call(prompts, sampling, image=to_pil(prompts), negative_prompt=[GREY] * len(prompts))


class DualGuidedPipeline(DUAL):
    """The public pipeline with the grey fixed."""

    def _encode_image_prompt(
        self, prompt: list[Image.Image], device: Any, num_images_per_prompt: int, do_classifier_free_guidance: bool
    ) -> Tensor:
        halves = [[GREY] * len(prompt), prompt] if do_classifier_free_guidance else [prompt]
        encode = super()._encode_image_prompt
        return torch.cat([encode(images, device, num_images_per_prompt, False) for images in halves])


class VersatileDual(LatentPipelineMethod):
    """A ``DualGuidedPipeline``; ``text_weight`` is w."""

    name = "versatile_dual"
    uses_text = True
    pipeline_class = DualGuidedPipeline
    unet_name = "image_unet"

    def __init__(self, pipeline: DualGuidedPipeline, source: str = "", text_weight: float = 0.5) -> None:
        pipeline.remove_unused_weights()  # the image UNet has taken over the text flow's layers
        super().__init__(pipeline, source)
        self.text_weight = text_weight
        for layer in self.dual_layers():
            layer.register_forward_pre_hook(drop_mask, with_kwargs=True)

    @property
    def trained(self) -> int:
        """The image flow, without the layers that read text."""
        text_layers = [layer.transformers[1] for layer in self.dual_layers()]
        return count_parameters(self.unet) - sum(count_parameters(layer) for layer in text_layers)

    def dual_layers(self) -> list[Any]:
        return [module for module in self.unet.modules() if isinstance(module, DualTransformer2DModel)]

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingOptions) -> Tensor:
        inputs = {"prompt": [prompt.text for prompt in prompts], "image": to_pil(prompts)}
        return self.call(prompts, sampling, **inputs, text_to_image_strength=self.text_weight)


def drop_mask(layer: Any, inputs: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a dual layer without the mask, which is always None here."""
    assert arguments.get("encoder_attention_mask") is None
    return inputs, {name: value for name, value in arguments.items() if name != "encoder_attention_mask"}
