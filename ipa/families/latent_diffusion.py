"""Base class of the families with a UNet: loading, sizes, noise schedule, hosts, sampling.

A subclass encodes the text, and says what the UNet and the public pipeline get besides the text states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForText2Image,
    DDIMScheduler,
    StableDiffusionAdapterPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from torch import Tensor

from ipa import objective
from ipa.errors import MissingWeights, UserError, brief
from ipa.families import family_of
from ipa.families.cross_attention import CrossAttentionHost, blocks_of, find_hosts
from ipa.families.pipeline_family import PROBES, PipelineFamily
from ipa.families.quantization import check_part, make_config
from ipa.families.sources import is_single_file
from ipa.families.unet_layout import read_conditions, read_host_widths, read_image_size
from ipa.presets import SCALINGS
from ipa.types import BaseWidths, Corrupted, TextCondition, TextInputs
from ipa.weights import read_dtype


class LatentDiffusion(PipelineFamily):
    """VAE, text encoders and UNet; ``parts`` have the names that the public pipeline gives them."""

    denoiser_name = "unet"
    denoiser_class = UNet2DConditionModel
    task_pipelines: ClassVar = {
        **PipelineFamily.task_pipelines,
        "control": AutoPipelineForText2Image,
        "t2i_adapter": StableDiffusionAdapterPipeline,
    }
    branches = "unet"
    conditions: ClassVar[str]  # see `unet_layout.read_conditions`
    kept = ("attn2",)  # cross-attention: adapters start from copies of its K and V
    supports_min_snr = True
    rescales_guidance = True
    supports_absence = True
    scalings = SCALINGS

    unet: Any

    def __init__(self, source: str = "", **parts: Any) -> None:
        super().__init__(source, **parts)
        if not hasattr(self.scheduler, "alphas_cumprod"):
            raise UserError(
                f"base.path={source} samples with {type(self.scheduler).__name__}, which is no schedule of ᾱ_t: "
                "ipa trains ε- and v-prediction"
            )
        self.alphas_cumprod: Tensor = self.make_sampler().alphas_cumprod

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        dtype: str = "float32",
        vae_dtype: str | None = None,
        config: str | None = None,
        channels_last: bool = True,
        quantization: str | None = None,
        leave_out: Sequence[str] = (),
    ) -> Self:
        """Load a diffusers folder, a hub id, or one ``.safetensors`` file in the original layout.

        Weights are loaded in ``dtype`` (torch's name), those of the VAE in ``vae_dtype`` if given. ``config`` is the
        folder or hub id of a diffusers pipeline with the layout of a single file; None asks the hub, folders do not
        need it. ``channels_last`` stores the convolutions' weights as their kernels read them, which changes rounding.
        ``quantization`` of the UNet is a scheme of `ipa.families.quantization`; cross-attention stays as it is, since
        adapters start from copies of its K and V. Parts that ``leave_out`` names are not loaded (``stand_ins``).

        Raises UserError for a base of another family, of which only configuration and headers are read, and for one
        that cannot be read.
        """
        dtypes = {"default": read_dtype(dtype, "base.dtype"), "vae": read_dtype(vae_dtype or dtype, "base.vae_dtype")}
        cls.check(path, config, quantization)
        if is_single_file(path):
            # other parts of a single file are always read
            given = cls.absent | cls.stand_ins(path, [each for each in leave_out if each == "text"])
            pipeline = load_single_file(cls.pipeline_class, path, config, dtypes, given, quantization, cls.kept)
        else:
            given, schemes = cls.absent | cls.stand_ins(path, leave_out), cls.quantized_parts(quantization)
            pipeline = cls.load_folder(path, dtypes, given, schemes)
        family = cls.around(pipeline, path)
        family.quantization = quantization
        if channels_last:
            for part in (family.unet, family.vae):
                part.to(memory_format=torch.channels_last)
        return family

    @classmethod
    def recognises(cls, path: str, key: str = "base.path") -> bool:
        return read_conditions(path, key) == cls.conditions

    @classmethod
    def check(cls, path: str, config: str | None, quantization: str | None = None, **options: Any) -> None:
        """Raise UserError for a base, or a layout for its file, of another family, and for an unfit scheme."""
        cls.check_family(path)
        check_part(quantization, path, "unet")
        if config is not None and is_single_file(path):
            cls.check_layout(path, config)

    @classmethod
    def check_layout(cls, path: str, config: str) -> None:
        if is_single_file(config):
            raise UserError(f"base.config={config} is a file: give the diffusers folder or hub id whose layout it has")
        layout = family_of(config, key="base.config")
        contexts = read_host_widths(config).context, read_host_widths(path).context
        if contexts[0] != contexts[1]:
            raise UserError(
                f"base.config={config} is the layout of {layout.title} with context width {contexts[0]}, but "
                f"base.path={path} holds {cls.title} with {contexts[1]}: give the layout of its own base"
            )

    @classmethod
    def read_widths(cls, path: str, config: str | None = None, **options: Any) -> BaseWidths:
        """Takes ``from_pretrained``'s arguments."""
        cls.check(path, config, **options)
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
    def context_width(self) -> int:
        return self.unet.config.cross_attention_dim

    @property
    def image_size_px(self) -> int:
        return self.unet.config.sample_size * self.cell_px

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    def prepare_text(self, texts: list[str]) -> TextInputs:
        """``ids``, B × (N L): the ids of all N tokenizers concatenated, each cut and padded to its length."""
        return {"ids": torch.cat(list(super().prepare_text(texts).values()), dim=1)}

    def split_ids(self, inputs: TextInputs) -> list[Tensor]:
        """The ids of each tokenizer, ids_BL."""
        return list(inputs["ids"].split([length for _, length in self.tokenized.values()], dim=1))

    def probe_ids(self) -> Any:
        return torch.stack(self.split_ids(self.prepare_text(PROBES)), dim=1).tolist()

    def hosts(self) -> list[CrossAttentionHost]:
        return find_hosts(self.unet)

    def blocks(self) -> list[str]:
        return blocks_of(self.unet)

    @classmethod
    def read_blocks(cls, path: str) -> list[str]:
        return blocks_of(cls.read_denoiser(path, "base"))

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

    @abstractmethod
    def added_conditions(self, text: TextCondition) -> dict[str, Tensor] | None:
        """What the UNet reads of the text besides its states."""

    def guidance_arguments(self, guidance: float, guidance_rescale: float = 0.0) -> dict[str, Any]:
        return {"guidance_scale": guidance, "guidance_rescale": guidance_rescale}

    def progress(self, time_B: Tensor) -> float:
        return 1 - float(time_B[0]) / (len(self.alphas_cumprod) - 1)

    def make_sampler(self) -> Any:
        """DDIM on the checkpoint's own schedule; latents exceed ±1, so they are never clipped."""
        return DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)


def load_single_file(
    pipeline_class: Any,
    path: str,
    config: str | None,
    dtypes: dict[str, torch.dtype],
    absent: dict[str, Any],
    quantization: str | None = None,
    kept: Sequence[str] = (),
) -> Any:
    """A pipeline from one file in the original layout; raises UserError with the advice."""
    dtype, vae_dtype = dtypes["default"], dtypes["vae"]
    try:
        parts = dict(absent)
        if vae_dtype != dtype:  # diffusers knows one dtype for a whole file
            parts["vae"] = AutoencoderKL.from_single_file(path, config=config, subfolder="vae", dtype=vae_dtype)
        if quantization:
            scheme = make_config(quantization, diffusers, dtype, kept)
            parts["unet"] = UNet2DConditionModel.from_single_file(
                path, config=config, subfolder="unet", dtype=dtype, quantization_config=scheme
            )
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
