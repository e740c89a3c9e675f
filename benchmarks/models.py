"""The models that are measured: the demo world's, and SD 1.5 and SDXL at full size with random weights.

Random weights cost what trained ones cost, and need no model hub.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ipa.adapter.heads import GlobalHead, ResamplerHead
from ipa.adapter.kinds import DecoupledAdapter
from ipa.encoders.open_clip import OpenClipEncoder
from ipa.families.sdxl import StableDiffusionXL
from ipa.families.stable_diffusion import StableDiffusion
from ipa.model import IPAdapterModel
from ipa.types import Batch, Draws, Features, Posterior

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
HEADS: dict[str, Callable[..., Any]] = {"global": GlobalHead.fitting, "fine_grained": ResamplerHead.fitting}
SDXL_RESAMPLER = {"width": 1280, "heads": 20}


def make_demo(head: str = "global") -> IPAdapterModel:
    family = StableDiffusion.from_pretrained("demo/base")
    sizes = {"width": 64, "heads": 1} if head == "fine_grained" else {}
    return put_together(family, OpenClipEncoder.from_pretrained("local-dir:demo/encoder"), head, **sizes)


def make_sd15(head: str = "global") -> IPAdapterModel:
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1)
    family = StableDiffusion(make_vae(0.18215, 512), CLIPTextModel(text), make_tokenizer(), unet, scheduler, "random")
    return put_together(family, make_vit_h(), head)


def make_sdxl(head: str = "global") -> IPAdapterModel:
    first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    second = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    )
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    encoders = CLIPTextModel(first), CLIPTextModelWithProjection(second)
    tokenizers = make_tokenizer(), make_tokenizer()
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1)
    family = StableDiffusionXL(make_vae(0.13025, 1024), *encoders, *tokenizers, unet, scheduler, "random")
    return put_together(family, make_vit_h(), head, **(SDXL_RESAMPLER if head == "fine_grained" else {}))


MAKERS = {"demo": make_demo, "sd15": make_sd15, "sdxl": make_sdxl}
IMAGE_PX = {"demo": 64, "sd15": 512, "sdxl": 1024}


def make_hollow(
    size: str,
    fake: FakeTensorMode,
    device: str = "cpu",
    head: str = "global",
    prepare: Callable[[IPAdapterModel], object] = lambda model: None,
) -> IPAdapterModel:
    """A model as if on this device, whose weights take no memory: to be used inside ``fake``.

    ``prepare`` may change types and layouts, which fake weights do not let anybody do later.
    """
    with torch.device("meta"):
        model = MAKERS[size](head)
    prepare(model)
    with fake:
        for module in model.modules():
            hollow(module._parameters, device)
            hollow(module._buffers, device)
    return model


def hollow(tensors: dict[str, Any], device: str) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            empty = torch.empty_like(tensor, device=device)
            tensors[name] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def make_vae(scaling_factor: float, size_px: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=size_px,
        scaling_factor=scaling_factor,
    )


def make_tokenizer() -> CLIPTokenizer:
    """Letters as tokens; what a text says costs nothing, how long it may be does."""
    pieces = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def make_vit_h() -> OpenClipEncoder:
    import open_clip

    clip: Any = open_clip.create_model("ViT-H-14", load_weights=False, device=torch.get_default_device())
    clip.visual.preprocess_cfg = open_clip.get_model_preprocess_cfg(clip)
    clip.visual.output_dim = 1024
    return OpenClipEncoder(clip.visual, "random")


def put_together(family: Any, encoder: Any, head: str, **sizes: int) -> IPAdapterModel:
    made = HEADS[head](encoder.widths, family.context_width, **sizes)
    return IPAdapterModel(family, encoder, made, DecoupledAdapter(family.hosts()))


def make_batch(model: IPAdapterModel, batch: int, image_px: int, cached: bool, seed: int = 0) -> Batch:
    """Random samples on the model's device: pictures, or in their place what a feature cache holds of them."""
    draw = torch.Generator().manual_seed(seed)
    latents = (batch, *model.family.latent_shape(image_px))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    pixels = {
        name: torch.randint(256, (batch, 3, size_px, size_px), generator=draw, dtype=torch.uint8)
        for name, size_px in (("image_B3HW", image_px), ("reference_B3HW", model.encoder.image_size_px))
    }
    draws = Draws(
        posterior_noise_BCHW=normal(*latents),
        noise_BCHW=normal(*latents),
        time_B=torch.rand(batch, generator=draw),
        drop_text_B=torch.rand(batch, generator=draw) < 0.1,
        drop_image_B=torch.rand(batch, generator=draw) < 0.1,
    )
    texts = ["a picture of a thing"] * batch
    rest: dict[str, Any] = cached_parts(model, normal, latents, batch) if cached else pixels
    inputs = model.family.prepare_text(texts)
    return Batch(text=texts, draws=draws, text_inputs=inputs, **rest).to(model.device)


def cached_parts(model: IPAdapterModel, normal: Callable[..., Tensor], latents: Any, batch: int) -> dict[str, Any]:
    widths = model.encoder.widths
    features = {
        "pooled": lambda: Features(pooled_BE=normal(batch, widths.pooled).half()),
        "patches": lambda: Features(patches_BPF=normal(batch, widths.num_patches, widths.patch).half()),
    }
    posterior = Posterior(normal(*latents), normal(*latents) - 5).map(Tensor.half)
    return {"posterior": posterior, "features": features[model.head.uses]()}
