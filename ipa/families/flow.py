"""Base class of the families with a transformer and rectified flow: loading, noise path, timestep sampling.

    x_σ = (1 − σ) x_0 + σ ε,     target = ε − x_0     (`ipa.objective`)

σ comes from the checkpoint's own training table, sampled and weighted as in diffusers' training scripts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers import AutoencoderKL
from torch import Tensor

from ipa import objective
from ipa.errors import UserError
from ipa.families.pipeline_family import PipelineFamily
from ipa.families.quantization import check_part
from ipa.families.sources import is_single_file, read_cell_px, read_index, read_part
from ipa.families.transformer_file import check_file, load_file
from ipa.types import BaseWidths, Corrupted
from ipa.weights import read_dtype

TABLE, RESOLUTION = "scheduler", "resolution"


@dataclass(frozen=True)
class FlowTimes:
    """Which noise levels are trained, and their weights; see `ipa.objective`.

    ``timesteps``: uniform, logit_normal (``logit_mean``, ``logit_std``) or mode (``mode_scale``). ``shift``: the
    checkpoint's training table (scheduler), that of sampling at the image's size (resolution), or a factor.
    ``weighting``: none, sigma_sqrt or cosmap. Raises UserError for other words.
    """

    timesteps: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: str | float = TABLE
    weighting: str = "none"

    def __post_init__(self) -> None:
        for name, known in (("timesteps", objective.TIMESTEPS), ("weighting", objective.WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise UserError(f"base.times.{name}={getattr(self, name)}: give one of {', '.join(known)}")
        if isinstance(self.shift, str) and self.shift not in (TABLE, RESOLUTION):
            raise UserError(f"base.times.shift={self.shift}: give {TABLE}, {RESOLUTION}, or a factor such as 3")

    def sigma(self, u_B: Tensor, table_S: Tensor, num_tokens: int) -> Tensor:
        """Noise levels σ for uniform draws. ``table_S`` descends from 1; ``num_tokens`` are those of the image."""
        quantile_B = objective.noise_quantile(u_B, self.timesteps, self.logit_mean, self.logit_std, self.mode_scale)
        index_B = (quantile_B * len(table_S)).long().clamp(0, len(table_S) - 1)
        if self.shift == TABLE:
            return table_S.to(u_B.device).flip(0)[index_B]
        sigma_B = (index_B + 1).float() / len(table_S)
        factor = objective.resolution_shift(num_tokens) if self.shift == RESOLUTION else float(self.shift)
        return objective.shift_noise(sigma_B, factor)

    def describe(self) -> dict[str, str]:
        return {"timesteps": self.timesteps, "timestep_shift": str(self.shift), "loss_weighting": self.weighting}


class FlowFamily(PipelineFamily):
    """VAE, text encoders and transformer; ``parts`` have the names that the public pipeline gives them.

    ``time_factor`` times σ is what the transformer takes as its time.
    """

    denoiser_name = "transformer"
    published_bytes = 2
    time_factor: ClassVar[float]
    patch: ClassVar[int] = 2  # latent cells along the edge of an image token
    needs: ClassVar[dict[str, str]]  # parts that a base must have → what they are, for messages
    guidance_option: ClassVar[str] = "guidance_scale"
    t5_parts: ClassVar[tuple[str, str]]  # text encoder and tokenizer

    transformer: Any

    def __init__(self, source: str, times: FlowTimes | None = None, **parts: Any) -> None:
        super().__init__(source, **parts)
        self.times = times or FlowTimes()
        self.sigmas: Tensor = self.make_sampler().sigmas

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        dtype: str = "float32",
        vae_dtype: str | None = None,
        config: str | None = None,
        quantization: str | None = None,
        text_quantization: str | None = None,
        transformer_file: str | None = None,
        leave_out: Sequence[str] = (),
        **options: Any,
    ) -> Self:
        """Load a diffusers folder or a hub id; ``options`` are the constructor's.

        Weights are loaded in ``dtype`` (torch's name), those of the VAE in ``vae_dtype`` if given, and none of what
        ``leave_out`` names (``stand_ins``). ``quantization`` of the transformer and ``text_quantization`` of T5 are
        schemes of `ipa.families.quantization`. ``transformer_file`` is a GGUF or safetensors file with the transformer,
        in place of the folder's. Raises UserError for a base of another family, or one without a part, of which only
        the configuration is read.
        """
        dtypes = {"default": read_dtype(dtype, "base.dtype"), "vae": read_dtype(vae_dtype or dtype, "base.vae_dtype")}
        schemes = {"quantization": quantization, "text_quantization": text_quantization}
        cls.check(path, transformer_file=transformer_file, **schemes, **options)
        given = cls.absent | cls.left_out(**options) | cls.stand_ins(path, leave_out)
        if transformer_file and "denoiser" not in leave_out:
            stored = (cls.denoiser_class, transformer_file, path)
            given["transformer"] = load_file(*stored, quantization, dtypes["default"])
        pipeline = cls.load_folder(path, dtypes, given, cls.quantized_parts(**schemes))
        family = cls.around(pipeline, path, **options)
        family.quantization = " ".join(filter(None, [quantization, transformer_file and Path(transformer_file).name]))
        return family

    @classmethod
    def quantized_parts(cls, quantization: str | None, text_quantization: str | None = None) -> dict[str, str | None]:
        return {cls.denoiser_name: quantization, cls.t5_parts[0]: text_quantization}

    @classmethod
    def recognises(cls, path: str, key: str = "base.path") -> bool:
        if is_single_file(path):
            return False
        if (read_index(path, key).get("transformer") or [None, None])[1] != cls.denoiser_class.__name__:
            return False
        config = read_part(cls.denoiser_class, path, "transformer", key)
        return config.get("out_channels") in (None, config.get("in_channels"))  # others read a second image

    @classmethod
    def check(
        cls,
        path: str,
        quantization: str | None = None,
        text_quantization: str | None = None,
        transformer_file: str | None = None,
        **options: Any,
    ) -> None:
        """Refuse a base of another family, or with missing or unfit parts; raises UserError."""
        cls.check_family(path)
        index, absent = read_index(path, "base.path"), cls.left_out(**options)
        for name, what in cls.needs.items():
            if (index.get(name) or [None])[0] is None and name not in absent:
                raise UserError(f"base.path={path} has no {name}, {what}: give a folder with all parts of {cls.title}")
        if transformer_file:
            check_file(transformer_file, cls.read_denoiser(path), path, quantization)
        else:
            check_part(quantization, path, "transformer")
        if cls.t5_parts[0] not in absent:
            check_part(text_quantization, path, cls.t5_parts[0], "base.text_quantization")

    @classmethod
    def read_widths(cls, path: str, config: str | None = None, **options: Any) -> BaseWidths:
        cls.check(path, **options)
        return cls.widths_of(cls.read_denoiser(path), **options)

    @classmethod
    @abstractmethod
    def widths_of(cls, transformer: Any, **options: Any) -> BaseWidths:
        """The widths of a transformer with the constructor's ``options``."""

    @classmethod
    @abstractmethod
    def hosts_of(cls, transformer: Any) -> list[Any]:
        """The hosts of a transformer with default options."""

    @classmethod
    def read_blocks(cls, path: str) -> list[str]:
        return list(dict.fromkeys(host.block for host in cls.hosts_of(cls.read_denoiser(path, "base"))))

    @classmethod
    def read_image_size_px(cls, path: str, config: str | None = None, **options: Any) -> int:
        """The image size that the base was trained for, from its configuration."""
        cls.check(path, **options)
        return read_part(AutoencoderKL, path, "vae")["sample_size"]

    @classmethod
    def read_size_multiple_px(cls, path: str, config: str | None = None, **options: Any) -> int:
        return cls.patch * read_cell_px(path)

    @property
    def image_size_px(self) -> int:
        return self.vae.config.sample_size

    @property
    def size_multiple_px(self) -> int:
        return self.cell_px * self.patch

    @property
    def text_width(self) -> int:
        return self.transformer.config.joint_attention_dim

    def compile_blocks(self) -> None:
        for stack in ("transformer_blocks", "single_transformer_blocks"):
            for block in getattr(self.transformer, stack, ()):
                block.compile(fullgraph=True)

    def corrupt(
        self, x0_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor, min_snr_gamma: float | None = None
    ) -> Corrupted:
        """Rectified flow at noise levels drawn and weighed by ``times``; latents stay B × C × H × W."""
        num_tokens = x0_BCHW.shape[-1] * x0_BCHW.shape[-2] // self.patch**2
        sigma_B = self.times.sigma(u_B, self.sigmas, num_tokens)
        noisy, target = objective.flow_path(x0_BCHW, noise_BCHW, sigma_B.to(x0_BCHW.dtype))
        weight_B = objective.flow_weight(sigma_B, self.times.weighting)
        return Corrupted(noisy, sigma_B * self.time_factor, target, weight_B)

    def progress(self, time_B: Tensor) -> float:
        return 1 - float(time_B[0]) / self.time_factor

    def guidance_arguments(self, guidance: float, guidance_rescale: float = 0.0) -> dict[str, Any]:
        self.check_options(guidance_rescale=guidance_rescale)
        return {self.guidance_option: guidance}

    def describe(self) -> dict[str, str]:
        return super().describe() | self.times.describe()


def require(value: Tensor | None, what: str) -> Tensor:
    """A part of a text condition; raises UserError, which names ``what``, if it is missing."""
    if value is None:
        raise UserError(f"{what} is missing: the text must come from this base's own encode_text")
    return value
