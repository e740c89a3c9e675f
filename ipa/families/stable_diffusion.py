"""Stable Diffusion 1.x and 2.x as a frozen family: one CLIP text encoder, a UNet, ε- or v-prediction.

family = StableDiffusion.from_pretrained("demo/base")
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from ipa.families.cross_attention import CrossAttentionHost, find_hosts
from ipa.types import Posterior, TextCondition


class StableDiffusion(nn.Module):
    """VAE, text encoder and UNet in eval mode without gradients; pixels are float in [-1, 1]."""

    name = "stable_diffusion"

    def __init__(
        self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any, source: str = ""
    ) -> None:
        super().__init__()
        self.vae, self.text_encoder, self.unet = vae, text_encoder, unet
        self.tokenizer, self.scheduler, self.source = tokenizer, scheduler, source
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str, dtype: str = "float32") -> Self:
        """Load a diffusers folder or hub id, weights in ``dtype`` (torch's name).

        Raises FileNotFoundError when a local path is not such a folder.
        """
        check_pipeline_folder(path)
        pipeline = StableDiffusionPipeline.from_pretrained(path, dtype=getattr(torch, dtype), safety_checker=None)
        parts = (pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.unet, pipeline.scheduler)
        return cls(*parts, source=path)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever the trainer asks: frozen parts do not drop out."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def context_width(self) -> int:
        return self.unet.config.cross_attention_dim

    @property
    def image_size_px(self) -> int:
        """The picture size that the UNet was made for."""
        return self.unet.config.sample_size * self.downsampling

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, image_size_px: int) -> tuple[int, int, int]:
        """C, H, W of the latents of a square picture."""
        cells = image_size_px // self.downsampling
        return (self.vae.config.latent_channels, cells, cells)

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    @property
    def alphas_cumprod(self) -> Tensor:
        return self.scheduler.alphas_cumprod

    def hosts(self) -> list[CrossAttentionHost]:
        return find_hosts(self.unet)

    @torch.no_grad()
    def encode_pixels(self, pixels_B3HW: Tensor) -> Posterior:
        """Scaled posterior: latents times the VAE's scaling factor, log-variance shifted to match."""
        posterior = self.vae.encode(pixels_B3HW.to(self.vae.dtype)).latent_dist
        factor = self.vae.config.scaling_factor
        return Posterior(posterior.mean.float() * factor, posterior.logvar.float() + 2 * math.log(factor))

    @torch.no_grad()
    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Scaled latents → pixels in [-1, 1], clipped."""
        latents = (latents_BCHW / self.vae.config.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(latents).sample.float().clamp(-1, 1)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> TextCondition:
        """Texts, cut at the tokenizer's length, → states_BLD."""
        ids_BL = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return TextCondition(self.text_encoder(ids_BL.to(self.device))[0])

    def denoise(self, latents_BCHW: Tensor, timestep_B: Tensor, text: TextCondition) -> Tensor:
        """The UNet's prediction (ε or v, see ``prediction_type``), in the latents' shape."""
        dtype = self.unet.dtype
        return self.unet(latents_BCHW.to(dtype), timestep_B, text.states_BLD.to(dtype)).sample

    def pipeline(self) -> StableDiffusionPipeline:
        """A public pipeline around these very parts, sampling with DDIM on the checkpoint's own schedule."""
        pipeline: Any = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(self.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def read_widths(path: str) -> tuple[int, list[int]]:
    """Context width, and the inner width of every host in order, from the configuration alone: no weight is read."""
    check_pipeline_folder(path)
    config = UNet2DConditionModel.load_config(path, subfolder="unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    return unet.config.cross_attention_dim, [host.attention.to_k.out_features for host in find_hosts(unet)]


def check_pipeline_folder(path: str) -> None:
    """Refuse what is clearly a local path but no pipeline folder; all of the form ``owner/name`` may be a hub id."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return
    if folder.exists():
        raise FileNotFoundError(
            f"base.path={path} is there but holds no model_index.json: it is not a diffusers pipeline folder. "
            "Give the folder that `pipeline.save_pretrained` wrote."
        )
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"base.path={path}: no such folder. Give a diffusers pipeline folder or a hub id owner/name."
        )
