"""Tiny parts made of the real classes, offline: the networks of Stable Diffusion and CLIP, 8 to 32 wide.

The widths all differ, so that a mix-up of two of them cannot go unseen: context 16, pooled embedding 12, patch 24.
"""

from __future__ import annotations

import copy
import json
import string
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from ipa.adapter.heads import FullHead, GlobalHead, Head, ResamplerHead
from ipa.adapter.kinds import DecoupledAdapter, SimpleAdapter
from ipa.encoders.open_clip import OpenClipEncoder
from ipa.export.published import to_published, with_metadata
from ipa.export.storage import save_adapter
from ipa.families.stable_diffusion import StableDiffusion
from ipa.model import IPAdapterModel
from ipa.types import Batch, Draws

CONTEXT_WIDTH = 16
POOLED_WIDTH = 12
PATCH_WIDTH = 24
IMAGE_PX = 16
REFERENCE_PX = 24
TEXT_LENGTH = 10
VISION_LAYERS = 3
# down 8, 8, 16, 16 | up 16, 16, 16, 8, 8, 8 | mid 32, as the published order has it
HIDDEN = [8, 8, 16, 16, 16, 16, 16, 8, 8, 8, 32]
VOCABULARY = [
    *string.ascii_lowercase,
    *(f"{letter}</w>" for letter in string.ascii_lowercase),
    "<|startoftext|>",
    "<|endoftext|>",
]
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# the four kinds of checkpoint: prediction type, and whether its schedule ends without signal
KINDS = [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False)]


class Harmful:
    """Creates ``file`` when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def plain_attention(query_BQd: Tensor, key_BTd: Tensor, value_BTd: Tensor, heads: int) -> Tensor:
    """softmax(Q Kᵀ / √d) V, one head after another."""
    out = []
    for q, k, v in zip(query_BQd.chunk(heads, -1), key_BTd.chunk(heads, -1), value_BTd.chunk(heads, -1), strict=True):
        out.append(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v)
    return torch.cat(out, dim=-1)


def make_tokenizer() -> CLIPTokenizer:
    """Letters as tokens, no merges; end-of-text has the highest id, where open_clip looks for it."""
    vocab = {piece: index for index, piece in enumerate(VOCABULARY)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TEXT_LENGTH)


def make_unet(**changes: Any) -> UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": CONTEXT_WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **changes})


def make_vae(**changes: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "scaling_factor": 0.3, "sample_size": IMAGE_PX}
    return AutoencoderKL(**{**blocks, **sizes, **changes})


def make_text_config(width: int, layers: int, hidden_act: str = "quick_gelu", **more: int) -> CLIPTextConfig:
    ends = {"bos_token_id": len(VOCABULARY) - 2, "eos_token_id": len(VOCABULARY) - 1}
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": TEXT_LENGTH, **ends, **more}
    return CLIPTextConfig(**sizes, hidden_act=hidden_act)


def make_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(make_text_config(CONTEXT_WIDTH, 2))


def make_family(prediction_type: str = "epsilon", zero_snr: bool = False, seed: int = 0) -> StableDiffusion:
    torch.manual_seed(seed)
    scheduler = DDIMScheduler(
        **SCHEDULE,
        clip_sample=False,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    family = StableDiffusion(
        "tiny",
        vae=make_vae(),
        text_encoder=make_text_encoder(),
        tokenizer=make_tokenizer(),
        unet=make_unet(),
        scheduler=scheduler,
    )
    make_loud(family)
    lay_out(family)
    return family


def lay_out(family: Any) -> None:
    """As ``from_pretrained`` does, so that a family and the one that was loaded from its files round alike."""
    for part in (family.unet, family.vae):
        part.to(memory_format=torch.channels_last)


def make_loud(family: Any) -> None:
    """Networks fresh from initialisation hardly hear their text: turn cross-attention up."""
    with torch.no_grad():
        for host in family.hosts():
            host.attention.to_v.weight.mul_(4)
            host.attention.to_out[0].weight.mul_(4)


def make_pipeline(family: StableDiffusion, **parts: Any) -> StableDiffusionPipeline:
    """The public pipeline around the family's parts, as ``save_pretrained`` and the stock calls need it."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    own = {name: getattr(family, name) for name in names}
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**{**own, **rest, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_config() -> dict[str, Any]:
    text = {"context_length": TEXT_LENGTH, "vocab_size": len(VOCABULARY), "width": 16, "heads": 2, "layers": 1}
    vision = {
        "image_size": REFERENCE_PX,
        "layers": VISION_LAYERS,
        "width": PATCH_WIDTH,
        "head_width": 8,
        "patch_size": 8,
    }
    return {"embed_dim": POOLED_WIDTH, "vision_cfg": vision, "text_cfg": text}


def preprocess_config() -> dict[str, Any]:
    return {
        "size": REFERENCE_PX,
        "mode": "RGB",
        "mean": OPENAI_DATASET_MEAN,
        "std": OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def make_clip(seed: int = 0) -> open_clip.CLIP:
    torch.manual_seed(seed)
    return open_clip.CLIP(**clip_config()).eval()


@cache
def made_encoder(seed: int) -> tuple[OpenClipEncoder, Tensor]:
    """And torch's random state after it."""
    visual: Any = make_clip(seed).visual
    visual.preprocess_cfg = preprocess_config()
    return OpenClipEncoder(visual, source="tiny"), torch.get_rng_state()


def make_encoder(seed: int = 0) -> OpenClipEncoder:
    """A copy of one that is made once: its constructor measures the features, half of a tiny model's time."""
    encoder, random_state = made_encoder(seed)
    torch.set_rng_state(random_state)
    return copy.deepcopy(encoder)


def make_vision(encoder: OpenClipEncoder) -> CLIPVisionModelWithProjection:
    """transformers' image encoder with the same weights, by the key map that made the demo world's."""
    from make_clip import to_transformers

    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=PATCH_WIDTH,
            intermediate_size=4 * PATCH_WIDTH,
            num_hidden_layers=VISION_LAYERS,
            num_attention_heads=PATCH_WIDTH // 8,
            image_size=REFERENCE_PX,
            patch_size=8,
            projection_dim=POOLED_WIDTH,
            hidden_act="gelu",
        )
    )
    missing, unknown = vision.load_state_dict(to_transformers(encoder.visual.state_dict(), VISION_LAYERS), strict=False)
    assert not unknown and all("position_ids" in name for name in missing)
    return vision.eval()


def save_clip(folder: Path, seed: int = 0) -> str:
    """Write an open_clip folder and return its ``local-dir:`` name."""
    folder.mkdir(parents=True)
    config = clip_config()
    config["text_cfg"]["hf_tokenizer_name"] = "tiny"
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess_config()})
    )
    save_file(make_clip(seed).state_dict(), folder / "open_clip_model.safetensors")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.bos_token  # padding with the highest id would hide where a text ends
    tokenizer.save_pretrained(folder)
    return f"local-dir:{folder}"


def make_head(head: str, encoder: OpenClipEncoder, context_width: int, **options: Any) -> Head:
    """A head of this name in the published proportions: ``global``, ``fine_grained`` or ``full``."""
    if head == "fine_grained":
        return ResamplerHead.fitting(encoder.widths, context_width, **{"width": 20, "heads": 1, **options})
    return {"global": GlobalHead, "full": FullHead}[head].fitting(encoder.widths, context_width, **options)


def make_model(
    prediction_type: str = "epsilon",
    zero_snr: bool = False,
    num_tokens: int | None = None,
    head: str = "global",
    kind: str = "decoupled",
    family: Any = None,
    **options: Any,
) -> IPAdapterModel:
    """A model with a fresh adapter, not installed; ``options`` are the head's."""
    family, encoder = family or make_family(prediction_type, zero_snr), make_encoder()
    options |= {} if num_tokens is None else {"num_tokens": num_tokens}
    made = make_head(head, encoder, family.context_width, **options)
    adapter = {"decoupled": DecoupledAdapter, "simple": SimpleAdapter}[kind](family.hosts())
    return IPAdapterModel(family, encoder, made, adapter)


def shake(model: IPAdapterModel, amount: float = 0.2, seed: int = 1) -> IPAdapterModel:
    """Move every trainable weight, so that K′ and V′ are no longer K and V."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return model


def write_adapter(path: Path, metadata: dict[str, str] | None = None, seed: int = 1, **options: Any) -> IPAdapterModel:
    """Write the file of an adapter that has moved, in fp32; returns the model with that adapter, not installed."""
    model = shake(make_model(**options), seed=seed)
    tensors = to_published(model.trainable.state_dict(), torch.float32)
    save_adapter(path, tensors, with_metadata(tensors, {**model.describe(), **(metadata or {})}))
    return model


def make_pictures(batch: int, size_px: int, seed: int = 0) -> Tensor:
    """uint8 noise, B3HW."""
    return torch.randint(
        256, (batch, 3, size_px, size_px), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def make_batch(batch: int = 3, seed: int = 0, drop_text: bool = False, drop_image: bool = False) -> Batch:
    """Samples with texts of different lengths; the drops are for all rows."""
    generator = torch.Generator().manual_seed(seed)
    latents = (batch, 4, IMAGE_PX // 2, IMAGE_PX // 2)
    return Batch(
        image_B3HW=make_pictures(batch, IMAGE_PX, seed),
        reference_B3HW=make_pictures(batch, REFERENCE_PX, seed + 1),
        text=["cat", "a dog", "red hearts", "b"][:batch],
        draws=Draws(
            posterior_noise_BCHW=torch.randn(latents, generator=generator),
            noise_BCHW=torch.randn(latents, generator=generator),
            time_B=torch.rand(batch, generator=generator),
            drop_text_B=torch.full((batch,), drop_text),
            drop_image_B=torch.full((batch,), drop_image),
        ),
    )


def make_inputs(model: IPAdapterModel, batch: int = 2) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Latents, timesteps, encoded texts and image tokens for calls of ``model.predict``."""
    latents = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    t_B = torch.tensor([999, 10, 500])[:batch]
    text = model.family.encode_text(["cat", "a red dog", ""][:batch])
    with torch.no_grad():
        tokens = model.image_tokens(model.encode_reference(make_pictures(batch, REFERENCE_PX)))
    return latents, t_B, text, tokens
