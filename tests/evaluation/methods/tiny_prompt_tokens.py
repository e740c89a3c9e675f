"""What the tests of the systems around Stable Diffusion share: tiny parts, prompts, the promises of every method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from diffusers import ControlNetModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ipa.encoders.vision_model import VisionModelEncoder
from ipa.errors import MissingWeights
from ipa.evaluation.methods.method import Prompt
from ipa.sampling import SamplingOptions

VISION_WIDTH = 24
FAST = SamplingOptions(num_steps=2, guidance=3.0)


def make_vision(projection: int = tiny.CONTEXT_WIDTH, **options: int) -> CLIPVisionModelWithProjection:
    sizes = {"hidden_size": VISION_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"image_size": 16, "patch_size": 8, "projection_dim": projection, **options}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes))


def make_image_encoder() -> VisionModelEncoder:
    return VisionModelEncoder(make_vision(), "tiny")


def make_controlnet(family: Any, pooled: bool = False) -> ControlNetModel:
    """Its zero convolutions moved, since those of a fresh one give nothing."""
    controlnet = ControlNetModel.from_unet(family.unet, conditioning_embedding_out_channels=(4, 8))
    controlnet.register_to_config(global_pool_conditions=pooled)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if not parameter.any():
                parameter.normal_()
    return controlnet


def make_prompts(texts: tuple[str, ...] = ("cat", "red dog", "")) -> list[Prompt]:
    """Pictures of different sizes and proportions."""
    shapes = [(20, 30), (33, 24), (16, 16)]
    generator = torch.Generator().manual_seed(0)
    return [
        Prompt(torch.randint(256, (3, *shape), generator=generator, dtype=torch.uint8), text, seed)
        for seed, (shape, text) in enumerate(zip(shapes, texts, strict=True))
    ]


def loud(module: nn.Module, factor: float = 4) -> nn.Module:
    """Matrices larger than initialisation makes them: a network fresh from it hardly tells two pictures apart."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return module


def other_image(prompt: Prompt) -> Prompt:
    return replace(prompt, image_3HW=255 - prompt.image_3HW.roll(3, -1))


def differs(a: Tensor, b: Tensor) -> bool:
    """By more than rounding, in every picture."""
    return bool(((a - b).abs().amax((1, 2, 3)) > 1e-3).all())


def check_promises(method: Any, sampling: SamplingOptions = FAST) -> Tensor:
    """What every method promises: see ``ipa.evaluation.methods.method``; returns the pixels of ``make_prompts()``."""
    prompts = make_prompts()
    others = [other_image(prompt) for prompt in prompts]
    pixels = method.generate(prompts, sampling)
    assert pixels.shape == (3, 3, tiny.IMAGE_PX, tiny.IMAGE_PX)
    assert pixels.dtype == torch.float32 and pixels.device.type == "cpu"
    assert pixels.isfinite().all() and pixels.abs().max() <= 1
    assert torch.equal(pixels, method.generate(prompts, sampling))

    assert differs(pixels, method.generate(others, sampling))
    assert differs(pixels, method.generate([replace(prompt, seed=prompt.seed + 9) for prompt in prompts], sampling))
    other_text = method.generate([replace(prompt, text="blue z") for prompt in prompts], sampling)
    assert differs(pixels, other_text) if method.uses_text else torch.equal(pixels, other_text)

    alone = torch.cat([method.generate([prompt], sampling) for prompt in reversed(prompts)])
    torch.testing.assert_close(alone.flip(0), pixels, atol=1e-4, rtol=0)
    assert method.to("cpu") is method
    assert not any(parameter.requires_grad for parameter in method.parameters())
    unguided = replace(sampling, guidance=1.0)  # is another picture, but reads the image all the same
    plain = method.generate(prompts, unguided)
    assert differs(plain, pixels) and differs(plain, method.generate(others, unguided))
    return pixels


def check_missing(load: Any, key: str, **given: Any) -> str:
    """Loading without the hub says what is missing, where it is and which key to give; returns the message."""
    with pytest.raises(MissingWeights, match=rf"method\.{key}=.*ownload.*give method\.{key}=") as caught:
        load(**given)
    return str(caught.value)
