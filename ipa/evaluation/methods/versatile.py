"""Versatile Diffusion: a diffusion model with an image flow and a text flow, trained from scratch (Xu et al. 2022).

The context of the image flow is all 257 tokens of CLIP ViT-L/14, projected, and divided by the class token's norm;
"no image" is the same of a grey picture. ``Versatile`` is image variation. ``VersatileDual`` runs every attention layer
of both flows and mixes what they add:

    h + w · (text layer(h) - h) + (1 - w) · (image layer(h) - h),   also where the text is empty

Weights of both in shi-labs/versatile-diffusion.

    method = Versatile.from_pretrained()

Two things of diffusers are mended here, in our pipelines alone: its grey is a float picture of 0.5 that CLIP's
processor divides by 255, so all but black; and its UNet hands every attention layer an ``encoder_attention_mask``, for
which the layers of the dual flow have no argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers import VersatileDiffusionDualGuidedPipeline, VersatileDiffusionImageVariationPipeline
from diffusers.models import DualTransformer2DModel
from PIL import Image
from torch import Tensor

from ipa.evaluation.methods.method import Prompt, Sampling
from ipa.evaluation.methods.pipelines import LatentPipelineMethod, Source, load_pipeline, pictures
from ipa.evaluation.methods.prompt_tokens import count_parameters

HUB_ID = "shi-labs/versatile-diffusion"
DUAL: Any = VersatileDiffusionDualGuidedPipeline  # its types are those of a placeholder
GREY = Image.new("RGB", (512, 512), (128, 128, 128))


class Versatile(LatentPipelineMethod):
    """A ``VersatileDiffusionImageVariationPipeline``: the image flow alone."""

    name = "versatile"
    uses_text = False

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, pipeline.image_unet, source)

    @classmethod
    def from_pretrained(cls, path: str = HUB_ID, dtype: str = "float16") -> Self:
        """Raises MissingWeights for what is neither here nor to be had, ValueError for what cannot be read."""
        return cls(load_pipeline(VersatileDiffusionImageVariationPipeline, Source(path), dtype), path)

    @property
    def trained(self) -> int:
        return count_parameters(self.unet)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
        return self.call(prompts, sampling, image=pictures(prompts), negative_prompt=[GREY] * len(prompts))


class DualGuidedPipeline(DUAL):
    """The public pipeline with a grey that is grey."""

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

    def __init__(self, pipeline: DualGuidedPipeline, source: str = "", text_weight: float = 0.5) -> None:
        pipeline.remove_unused_weights()  # the text flow's layers are in the image UNet by now, beside its own
        super().__init__(pipeline, pipeline.image_unet, source)
        self.text_weight = text_weight
        for layer in self.dual_layers():
            layer.register_forward_pre_hook(leave_out_mask, with_kwargs=True)

    @classmethod
    def from_pretrained(cls, path: str = HUB_ID, dtype: str = "float16", text_weight: float = 0.5) -> Self:
        """Raises MissingWeights for what is neither here nor to be had, ValueError for what cannot be read."""
        return cls(load_pipeline(DualGuidedPipeline, Source(path), dtype), path, text_weight)

    @property
    def trained(self) -> int:
        """The image flow, without the layers that read text."""
        text_layers = [layer.transformers[1] for layer in self.dual_layers()]
        return count_parameters(self.unet) - sum(count_parameters(layer) for layer in text_layers)

    def dual_layers(self) -> list[Any]:
        return [module for module in self.unet.modules() if isinstance(module, DualTransformer2DModel)]

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
        inputs = {"prompt": [prompt.text for prompt in prompts], "image": pictures(prompts)}
        return self.call(prompts, sampling, **inputs, text_to_image_strength=self.text_weight)


def leave_out_mask(layer: Any, inputs: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a dual layer without the mask that it does not know; there never is one here."""
    assert given.get("encoder_attention_mask") is None
    return inputs, {name: value for name, value in given.items() if name != "encoder_attention_mask"}
