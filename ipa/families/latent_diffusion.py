"""What the families of latent diffusion with a UNet share: loading, sizes, VAE, noise schedule, hosts, sampling.

A subclass adds its text: how it is encoded, and what of it the UNet and the public pipeline get besides the states.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.loaders.single_file_utils import SingleFileComponentError
from torch import Tensor

from ipa import objective
from ipa.contracts import DenoiserCall, Family
from ipa.errors import MissingWeights, UserError, brief
from ipa.families import family_of
from ipa.families.cross_attention import CrossAttentionHost, blocks_of, find_hosts
from ipa.families.sources import is_single_file
from ipa.families.unet_layout import read_conditions, read_host_widths, read_image_size
from ipa.types import BaseWidths, Corrupted, Posterior, TextCondition, TextInputs
from ipa.weights import fingerprint, read_dtype


class LatentDiffusion(Family):
    """VAE, text encoders and UNet; ``parts`` have the names that the public pipeline gives them."""

    pipeline_class: ClassVar[Any]
    # components that the public pipeline can have besides the parts, and is built without
    absent: ClassVar[dict[str, Any]]
    conditions: ClassVar[str]  # see `unet_layout.read_conditions`
    supports_min_snr = True
    supports_absence = True

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
        self.alphas_cumprod: Tensor = self.make_sampler().alphas_cumprod
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

        Weights are loaded in ``dtype`` (torch's name), those of the VAE in ``vae_dtype`` if given. ``config`` is the
        folder or hub id of a diffusers pipeline with the layout of a single file; None asks the hub, folders do not
        need it. ``channels_last`` stores the convolutions' weights as their kernels read them, which changes rounding.

        Raises UserError for a base of another family, of which only configuration and headers are read, and for one
        that cannot be read.
        """
        dtypes = {"default": read_dtype(dtype, "base.dtype"), "vae": read_dtype(vae_dtype or dtype, "base.vae_dtype")}
        cls.check(path, config)
        if is_single_file(path):
            pipeline = load_single_file(cls.pipeline_class, path, config, dtypes, cls.absent)
        else:
            pipeline = load_folder(cls.pipeline_class, path, dtypes, cls.absent)
        parts = {name: part for name, part in pipeline.components.items() if name not in cls.absent}
        if channels_last:
            for name in ("unet", "vae"):
                parts[name].to(memory_format=torch.channels_last)
        return cls(**parts, source=path)

    @classmethod
    def recognises(cls, path: str, key: str = "base.path") -> bool:
        return read_conditions(path, key) == cls.conditions

    @classmethod
    def check(cls, path: str, config: str | None) -> None:
        """Refuse a base, or a layout for its file, of another family; raises UserError."""
        family = family_of(path)
        if family is not cls:
            raise UserError(f"base.path={path} is a {family.title} pipeline: use {family.advice}")
        if config is None or not is_single_file(path):
            return
        if is_single_file(config):
            raise UserError(f"base.config={config} is a file: give the diffusers folder or hub id whose layout it has")
        layout = family_of(config, key="base.config")
        contexts = read_host_widths(config).context, read_host_widths(path).context
        if contexts[0] != contexts[1]:
            raise UserError(
                f"base.config={config} is the layout of {layout.title} with context width {contexts[0]}, but "
                f"base.path={path} holds {family.title} with {contexts[1]}: give the layout of its own base"
            )

    @classmethod
    def read_widths(cls, path: str, config: str | None = None, **options: Any) -> BaseWidths:
        """Takes ``from_pretrained``'s arguments."""
        cls.check(path, config)
        return read_host_widths(path)

    @classmethod
    def read_image_size_px(cls, path: str, config: str | None = None, **options: Any) -> int:
        """The image size that the UNet was trained for, from configuration; takes ``from_pretrained``'s arguments.

        Raises UserError for a single file without ``config``, since its header does not tell.
        """
        cls.check(path, config)
        layout = config if is_single_file(path) else path
        if layout is None:
            raise UserError(f"base.path={path} does not tell its image size: give image_size_px=… or base.config=…")
        return read_image_size(layout)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def context_width(self) -> int:
        return self.unet.config.cross_attention_dim

    @property
    def image_size_px(self) -> int:
        return self.unet.config.sample_size * self.size_multiple_px

    @property
    def size_multiple_px(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, image_size_px: int) -> tuple[int, int, int]:
        cells = image_size_px // self.size_multiple_px
        return (self.vae.config.latent_channels, cells, cells)

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    def hosts(self) -> list[CrossAttentionHost]:
        return find_hosts(self.unet)

    def blocks(self) -> list[str]:
        return blocks_of(self.unet)

    def checkpoint_gradients(self, function: Callable[..., Any]) -> None:
        """``function`` must restore, when it recomputes a block, the context of the block's first call."""
        self.unet.enable_gradient_checkpointing(gradient_checkpointing_func=function)

    def compile_blocks(self) -> None:
        """Compiles the transformer blocks, which takes seconds; the whole UNet would take minutes."""
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
        latents = (latents_BCHW / self.vae.config.scaling_factor).to(self.vae.dtype)
        with self._in_own_dtype():
            return self.vae.decode(latents).sample.float().clamp(-1, 1)

    def _in_own_dtype(self) -> torch.autocast:
        """Autocast would run a VAE in half precision that was loaded in float32 because it overflows there."""
        return torch.autocast(self.vae.device.type, enabled=False)

    @property
    def tokenizers(self) -> list[Any]:
        return [getattr(self, name) for name in self.part_names if name.startswith("tokenizer")]

    def prepare_text(self, texts: list[str]) -> TextInputs:
        """``ids``, B × (N L): the ids of all N tokenizers one after the other, each cut and padded to its length."""
        return {"ids": torch.cat([tokenize(tokenizer, texts) for tokenizer in self.tokenizers], dim=1)}

    def split_ids(self, inputs: TextInputs) -> list[Tensor]:
        """The ids of each tokenizer, ids_BL, on the base's device."""
        lengths = [tokenizer.model_max_length for tokenizer in self.tokenizers]
        return list(inputs["ids"].to(self.device).split(lengths, dim=1))

    def fingerprints(self) -> dict[str, str]:
        vae = f"{fingerprint(self.vae)} × {self.vae.config.scaling_factor:g}"
        return {"vae": vae, "tokenizer": self.tokenizer_hash()[:32]}

    def tokenizer_hash(self) -> str:
        """Distinguishes tokenizers that could give other ids: by vocabulary, length, special tokens and samples."""
        identity = [
            [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, tokenizer.special_tokens_map]
            for tokenizer in self.tokenizers
        ]
        ids_BNL = torch.stack([tokenize(tokenizer, PROBES) for tokenizer in self.tokenizers], dim=1)
        written = json.dumps([identity, ids_BNL.tolist()], sort_keys=True, default=str)
        return hashlib.sha256(written.encode()).hexdigest()

    def corrupt(
        self, x0_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor, min_snr_gamma: float | None = None
    ) -> Corrupted:
        """ε-, v- or sample prediction on the checkpoint's own schedule; see `ipa.objective`."""
        kind, alphas = self.prediction_type, self.alphas_cumprod
        time_B = objective.to_timesteps(u_B, len(alphas))
        noisy = objective.add_noise(x0_BCHW, noise_BCHW, alphas, time_B)
        target = objective.make_target(kind, x0_BCHW, noise_BCHW, alphas, time_B)
        return Corrupted(noisy, time_B, target, objective.loss_weight(kind, alphas, time_B, min_snr_gamma))

    def denoise(self, noisy: Tensor, time_B: Tensor, text: TextCondition) -> Tensor:
        states_BLD = text.states_BLD.to(self.dtype)
        added = self.added_conditions(text)
        return self.unet(noisy.to(self.dtype), time_B, states_BLD, added_cond_kwargs=added).sample

    def cut_off(self, text: str) -> str:
        for tokenizer in self.tokenizers:
            ids = tokenizer(text).input_ids
            if len(ids) > tokenizer.model_max_length:
                return str(tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1]))
        return ""

    @abstractmethod
    def added_conditions(self, text: TextCondition) -> dict[str, Tensor] | None:
        """What the UNet gets of the text besides its states."""

    def prompt_arguments(self, positive: TextCondition, negative: TextCondition | None) -> dict[str, Any]:
        arguments = {"prompt_embeds": positive.states_BLD}
        if negative is not None:
            arguments["negative_prompt_embeds"] = negative.states_BLD
        return arguments

    def guidance_arguments(self, guidance: float, guidance_rescale: float = 0.0) -> dict[str, Any]:
        return {"guidance_scale": guidance, "guidance_rescale": guidance_rescale}

    def progress(self, time_B: Tensor) -> float:
        return 1 - float(time_B[0]) / (len(self.alphas_cumprod) - 1)

    @contextmanager
    def before_calls(self, function: Callable[[DenoiserCall], None], negative: TextCondition | None) -> Iterator[None]:
        part: Any = "positive" if negative is None else "joint"

        def hook(unet: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            sample = named["sample"] if "sample" in named else inputs[0]
            time = named["timestep"] if "timestep" in named else inputs[1]
            function(DenoiserCall(torch.as_tensor(time, device=sample.device).expand(len(sample)), part))

        handle = self.unet.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def make_sampler(self) -> Any:
        """DDIM on the checkpoint's own schedule; latents exceed ±1, so they are never clipped."""
        return DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)

    def pipeline(self, pipeline_class: Any = None, **parts: Any) -> Any:
        """Samples with DDIM on the checkpoint's own schedule.

        With a ``vae_dtype`` of its own the VAE cannot read the pipeline's latents: ask for ``output_type="latent"`` and
        give them to ``decode_latents``.
        """
        own = {name: getattr(self, name) for name in self.part_names} | {"scheduler": self.make_sampler()}
        pipeline_class = pipeline_class or self.pipeline_class
        known = inspect.signature(pipeline_class.__init__).parameters  # not all know the absent ones
        pipeline = pipeline_class(**own, **{name: x for name, x in self.absent.items() if name in known}, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


# letter case, accents, punctuation, digits, and more than fits
PROBES = ["", "A naïve red-haired girl's café, 1987!", "über 東京 🙂 " * 40]


def tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    """Token ids, cut and padded to the tokenizer's length."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def load_folder(pipeline_class: Any, path: str, dtypes: dict[str, torch.dtype], absent: dict[str, Any]) -> Any:
    """A pipeline from a folder or hub id; raises UserError for one that lacks a file."""
    try:
        return pipeline_class.from_pretrained(path, dtype=dtypes, **absent)
    except OSError as error:
        raise MissingWeights(f"base.path={path} cannot be loaded: {brief(error)}") from error


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
            raise MissingWeights(f"base.config={config} lacks a part of the layout: {brief(error)}") from error
        raise MissingWeights(
            f"base.path={path}: the hub could not be asked for the layout of this file ({brief(error)}). Give "
            "base.config=FOLDER, a diffusers pipeline folder of the same base; its weights are not needed."
        ) from error
    except SingleFileComponentError as error:
        raise UserError(
            f"base.path={path}: {brief(error)} A base needs its UNet, VAE and text encoders in the file."
        ) from error
