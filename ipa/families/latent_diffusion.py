"""What the families of latent diffusion with a UNet share: loading, sizes, the VAE, the schedule, hosts, the call.

A family adds its text: ``encode_ids``, what of it goes to the UNet besides the states, and to the public pipeline.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.loaders.single_file_utils import SingleFileComponentError
from torch import Tensor, nn

from ipa.errors import UserError, brief
from ipa.families.cross_attention import CrossAttentionHost, find_hosts
from ipa.families.sources import check_kind, is_single_file, read_host_widths, read_image_size
from ipa.types import BaseWidths, Posterior, TextCondition


class LatentDiffusion(nn.Module, ABC):
    """VAE, text encoders and UNet in eval mode without gradients; pixels are float in [-1, 1].

    ``parts`` carry the names that the public pipeline has for them.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[Any]
    # what the public pipeline can have besides the parts, and is to go without
    absent: ClassVar[dict[str, Any]]

    vae: Any
    unet: Any
    scheduler: Any

    def __init__(self, source: str, **parts: Any) -> None:
        super().__init__()
        self.source, self.part_names = source, tuple(parts)
        for name, part in parts.items():
            setattr(self, name, part)
        if not hasattr(self.scheduler, "alphas_cumprod"):
            raise UserError(
                f"base.path={source} samples with {type(self.scheduler).__name__}, which is no schedule of ᾱ_t: "
                "ipa trains ε- and v-prediction"
            )
        sampler: Any = self.make_sampler()
        self.alphas_cumprod: Tensor = sampler.alphas_cumprod
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        dtype: str = "float32",
        vae_dtype: str | None = None,
        config: str | None = None,
        channels_last: bool = True,
    ) -> Self:
        """Load a diffusers folder, a hub id, or one ``.safetensors`` file in the original layout.

        Weights come in ``dtype`` (torch's name), the VAE's in ``vae_dtype`` if that is given. ``config`` is the folder
        or hub id of a diffusers pipeline whose layout a single file has; None asks the hub, folders do not need it.
        ``channels_last`` lays the convolutions' weights out as their kernels read them, which changes roundings.

        Raises UserError for a base of another family and OSError for one that cannot be read; of the first kind
        nothing but configuration and headers is read.
        """
        dtypes = {"default": to_dtype(dtype, "base.dtype"), "vae": to_dtype(vae_dtype or dtype, "base.vae_dtype")}
        check_kind(path, config, cls.name)
        if is_single_file(path):
            pipeline = load_single_file(cls.pipeline_class, path, config, dtypes, cls.absent)
        else:
            pipeline = cls.pipeline_class.from_pretrained(path, dtype=dtypes, **cls.absent)
        parts = {name: part for name, part in pipeline.components.items() if name not in cls.absent}
        if channels_last:
            for name in ("unet", "vae"):
                parts[name].to(memory_format=torch.channels_last)
        return cls(**parts, source=path)

    @classmethod
    def read_widths(cls, path: str, config: str | None = None, **ignored: Any) -> BaseWidths:
        """What an adapter must fit, from configuration or header alone; takes ``from_pretrained``'s arguments."""
        check_kind(path, config, cls.name)
        return read_host_widths(path)

    @classmethod
    def read_image_size_px(cls, path: str, config: str | None = None, **ignored: Any) -> int:
        """The picture size that the UNet was made for, from configuration files; takes ``from_pretrained``'s arguments.

        Raises UserError for a single file without ``config``, since its header does not say.
        """
        check_kind(path, config, cls.name)
        layout = config if is_single_file(path) else path
        if layout is None:
            raise UserError(f"base.path={path} does not say its picture size: give image_size_px=… or base.config=…")
        return read_image_size(layout)

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

    def hosts(self) -> list[CrossAttentionHost]:
        return find_hosts(self.unet)

    def checkpoint_gradients(self, function: Callable[..., Any]) -> None:
        """Let ``function(module, *inputs)`` run every block of the UNet that gradients go through.

        It must set up around a block again, when it recomputes it, whatever was set up around the first call.
        """
        self.unet.enable_gradient_checkpointing(gradient_checkpointing_func=function)

    def compile_blocks(self) -> None:
        """Let torch compile what the UNet repeats, its transformer blocks: seconds, where all of it takes minutes."""
        self.unet.compile_repeated_blocks(fullgraph=True)

    @torch.no_grad()
    def encode_pixels(self, pixels_B3HW: Tensor) -> Posterior:
        """Scaled posterior: latents times the VAE's scaling factor, log-variance shifted to match."""
        with self._in_own_dtype():
            posterior = self.vae.encode(pixels_B3HW.to(self.vae.dtype)).latent_dist
        factor = self.vae.config.scaling_factor
        return Posterior(posterior.mean.float() * factor, posterior.logvar.float() + 2 * math.log(factor))

    @torch.no_grad()
    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Scaled latents → pixels in [-1, 1], clipped."""
        latents = (latents_BCHW / self.vae.config.scaling_factor).to(self.vae.dtype)
        with self._in_own_dtype():
            return self.vae.decode(latents).sample.float().clamp(-1, 1)

    def _in_own_dtype(self) -> torch.autocast:
        """Autocast would run a VAE in half precision that was loaded in float32 because it overflows there."""
        return torch.autocast(self.vae.device.type, enabled=False)

    @property
    def tokenizers(self) -> list[Any]:
        return [getattr(self, name) for name in self.part_names if name.startswith("tokenizer")]

    def tokenize(self, texts: list[str]) -> Tensor:
        """ids_BNL of N tokenizers, cut and padded to their length."""
        return torch.stack([tokenize(tokenizer, texts) for tokenizer in self.tokenizers], dim=1)

    @abstractmethod
    def encode_ids(self, ids_BNL: Tensor, size_B6: Tensor | None = None) -> TextCondition:
        """What ``tokenize`` gives → what ``denoise`` takes; ``size_B6`` as in ``TextCondition``."""

    def encode_text(self, texts: list[str], size_B6: Tensor | None = None) -> TextCondition:
        return self.encode_ids(self.tokenize(texts), size_B6)

    def tokenizer_hash(self) -> str:
        """Tells apart tokenizers that could give other ids: by vocabulary, length, special tokens and a sample."""
        identity = [
            [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, tokenizer.special_tokens_map]
            for tokenizer in self.tokenizers
        ]
        written = json.dumps([identity, self.tokenize(PROBES).tolist()], sort_keys=True, default=str)
        return hashlib.sha256(written.encode()).hexdigest()

    def prompt_arguments(self, positive: TextCondition, negative: TextCondition | None) -> dict[str, Any]:
        """Encoded text as keyword arguments of ``pipeline()``; no ``negative`` leaves its arguments out."""
        arguments = {"prompt_embeds": positive.states_BLD}
        if negative is not None:
            arguments["negative_prompt_embeds"] = negative.states_BLD
        return arguments

    def added_conditions(self, text: TextCondition) -> dict[str, Tensor] | None:
        """What the UNet is given of the text besides its states."""
        return None

    def denoise(self, latents_BCHW: Tensor, timestep_B: Tensor, text: TextCondition) -> Tensor:
        """The UNet's prediction (ε or v, see ``prediction_type``), in the latents' shape."""
        dtype = self.unet.dtype
        states_BLD = text.states_BLD.to(dtype)
        added = self.added_conditions(text)
        return self.unet(latents_BCHW.to(dtype), timestep_B, states_BLD, added_cond_kwargs=added).sample

    def make_sampler(self) -> DDIMScheduler:
        """DDIM on the checkpoint's own schedule; latents go beyond ±1, so they are never clipped."""
        return DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)

    def pipeline(self) -> Any:
        """A public pipeline around these very parts, sampling with DDIM on the checkpoint's own schedule.

        With a ``vae_dtype`` of its own the VAE cannot read the pipeline's latents: ask for ``output_type="latent"`` and
        give them to ``decode_latents``.
        """
        parts = {name: getattr(self, name) for name in self.part_names}
        pipeline = self.pipeline_class(**{**parts, **self.absent, "scheduler": self.make_sampler()})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


# letter case, accents, punctuation, digits, and more than fits
PROBES = ["", "A naïve red-haired girl's café, 1987!", "über 東京 🙂 " * 40]


def tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    """Token ids, cut and padded to the tokenizer's length."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def load_single_file(
    pipeline_class: Any, path: str, config: str | None, dtypes: dict[str, torch.dtype], absent: dict[str, Any]
) -> Any:
    """A pipeline from one file in the original layout; raises UserError with the advice."""
    dtype, vae_dtype = dtypes["default"], dtypes["vae"]
    try:
        parts = dict(absent)
        if vae_dtype != dtype:  # diffusers knows one dtype for a whole file
            parts["vae"] = AutoencoderKL.from_single_file(path, config=config, subfolder="vae", dtype=vae_dtype)
        return pipeline_class.from_single_file(path, config=config, dtype=dtype, **parts)
    except OSError as error:
        if config is not None:
            raise UserError(f"base.config={config} lacks a part of the layout: {brief(error)}") from error
        raise UserError(
            f"base.path={path}: the hub could not be asked for the layout of this file ({brief(error)}). Give "
            "base.config=FOLDER, a diffusers pipeline folder of the same base; its weights are not needed."
        ) from error
    except SingleFileComponentError as error:
        raise UserError(
            f"base.path={path}: {brief(error)} A base needs its UNet, VAE and text encoders in the file."
        ) from error


def to_dtype(name: str, key: str) -> torch.dtype:
    """The floating dtype that torch calls ``name``; raises UserError naming ``key``."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"{key}={name}: give float32, bfloat16 or float16")
    return dtype
