"""Base class of the families that are diffusers pipelines: parts, VAE, tokenizers, and the pipeline around them.

A subclass names its denoiser and adds text encoding, noise path and hosts.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, AutoPipelineForImage2Image, AutoPipelineForInpainting
from torch import Tensor

from ipa.contracts import Family
from ipa.errors import MissingWeights, UserError, brief
from ipa.families import family_of
from ipa.families.quantization import load_quantized
from ipa.families.sources import check_files, make_without_weights, parts_in, read_index
from ipa.types import DenoiserCall, Part, Posterior, TextCondition, TextInputs
from ipa.weights import fingerprint


class PipelineFamily(Family):
    """``parts`` have the names that the public pipeline gives them; one of them, ``denoiser_name``, is the denoiser."""

    pipeline_class: ClassVar[Any]
    denoiser_name: ClassVar[str]
    denoiser_class: ClassVar[Any]
    # optional components of the public pipeline, which is built without them
    absent: ClassVar[dict[str, Any]]
    task_pipelines: ClassVar[Mapping[str, Any]] = {
        "start_image": AutoPipelineForImage2Image,
        "inpaint": AutoPipelineForInpainting,
    }
    published_bytes: ClassVar[int] = 4  # of a weight on the hub
    kept: ClassVar[tuple[str, ...]] = ()  # layers of the denoiser that are never quantized

    vae: Any
    scheduler: Any
    quantization: str | None = None  # of the denoiser; see `ipa.families.quantization`

    def __init__(self, source: str = "", **parts: Any) -> None:
        super().__init__()
        self.source, self.part_names = source, tuple(parts)
        for name, part in parts.items():
            setattr(self, name, part)
        self.eval().requires_grad_(False)

    @classmethod
    def check_family(cls, path: str) -> None:
        """Refuse a base of another family; raises UserError."""
        family = family_of(path)
        if family is not cls:
            raise UserError(f"base.path={path} is a {family.title} pipeline: use {family.advice}")

    @classmethod
    def stand_ins(cls, path: str, leave_out: Sequence[str]) -> dict[str, Any]:
        """Components in place of those that ``leave_out`` names: no text encoders; denoiser and VAE without weights."""
        names = inspect.signature(cls.pipeline_class.__init__).parameters
        found = {name: None for name in names if name.startswith("text_encoder") and "text" in leave_out}
        found |= {cls.denoiser_name: cls.read_denoiser(path)} if "denoiser" in leave_out else {}
        return found | ({"vae": make_without_weights(AutoencoderKL, path, "vae")} if "vae" in leave_out else {})

    @classmethod
    def read_denoiser(cls, path: str, key: str = "base.path") -> Any:
        """The denoiser of a folder or hub id on the meta device, without weights."""
        return make_without_weights(cls.denoiser_class, path, cls.denoiser_name, key)

    @classmethod
    def left_out(cls, **options: Any) -> dict[str, Any]:
        """Parts that a family with these options does not need and does not load."""
        return {}

    @classmethod
    def quantized_parts(cls, quantization: str | None, text_quantization: str | None = None) -> dict[str, str | None]:
        """The parts that can be quantized, with their schemes."""
        return {cls.denoiser_name: quantization}

    @classmethod
    def load_folder(
        cls, path: str, dtypes: dict[str, torch.dtype], given: dict[str, Any], schemes: Mapping[str, str | None]
    ) -> Any:
        """The pipeline of a folder or hub id, around the parts that are ``given``; None leaves a part out.

        ``schemes`` quantize parts (`ipa.families.quantization`). Raises UserError for a folder that lacks a file.
        """
        check_files(path, [name for name in parts_in(read_index(path, "base.path")) if name not in given])
        wanted = {name: scheme for name, scheme in schemes.items() if scheme and name not in given}
        try:
            quantized = {
                name: load_quantized(path, name, class_of(path, name), scheme, dtypes["default"], cls.kept)
                for name, scheme in wanted.items()
            }
            return cls.pipeline_class.from_pretrained(path, dtype=dtypes, **given, **quantized)
        except OSError as error:
            raise MissingWeights(f"base.path={path} cannot be loaded: {brief(error)}") from error

    @classmethod
    def around(cls, pipeline: Any, source: str, **options: Any) -> Self:
        """The family of a loaded pipeline's parts."""
        parts = {name: part for name, part in pipeline.components.items() if name not in cls.absent}
        return cls(source, **parts, **options)

    @property
    def denoiser(self) -> Any:
        return getattr(self, self.denoiser_name)

    @property
    def text_encoders(self) -> list[Any]:
        parts = [getattr(self, name) for name in self.part_names if name.startswith("text_encoder")]
        return [part for part in parts if part is not None]

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def cell_px(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_multiple_px(self) -> int:
        return self.cell_px

    def latent_shape(self, image_size_px: int) -> tuple[int, int, int]:
        cells = image_size_px // self.cell_px
        return (self.vae.config.latent_channels, cells, cells)

    def checkpoint_gradients(self, function: Callable[..., Any]) -> None:
        """When ``function`` recomputes a block, it must restore the context of the block's first call."""
        self.denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=function)

    def compile_blocks(self) -> None:
        """Only the transformer blocks, which takes seconds; the whole denoiser would take minutes."""
        self.denoiser.compile_repeated_blocks(fullgraph=True)

    @property
    def vae_scale(self) -> tuple[float, float]:
        """Shift and factor: latents = (z − shift) · factor."""
        config = self.vae.config
        return config.get("shift_factor") or 0.0, config.scaling_factor

    @torch.no_grad()
    def encode_pixels(self, pixels_B3HW: Tensor) -> Posterior:
        """Scaled posterior: the mean is shifted and scaled as in the VAE's configuration, the variance to match."""
        with self._in_own_dtype():
            posterior = self.vae.encode(pixels_B3HW.to(self.vae.dtype)).latent_dist
        shift, factor = self.vae_scale
        return Posterior((posterior.mean.float() - shift) * factor, posterior.logvar.float() + 2 * math.log(factor))

    @torch.no_grad()
    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        shift, factor = self.vae_scale
        latents = (latents_BCHW / factor + shift).to(self.vae.dtype)
        with self._in_own_dtype():
            return self.vae.decode(latents).sample.float().clamp(-1, 1)

    def _in_own_dtype(self) -> torch.autocast:
        """Without autocast, which would run a VAE in half precision that overflows there."""
        return torch.autocast(self.vae.device.type, enabled=False)

    @property
    def tokenizers(self) -> list[Any]:
        parts = [getattr(self, name) for name in self.part_names if name.startswith("tokenizer")]
        return [part for part in parts if part is not None]

    @property
    def tokenized(self) -> dict[str, tuple[Any, int]]:
        """Name of a text input → its tokenizer and its length in tokens; the one that reads most of a text first."""
        return {f"ids_{number}": (each, each.model_max_length) for number, each in enumerate(self.tokenizers)}

    def prepare_text(self, texts: list[str]) -> TextInputs:
        """The ids of each tokenizer, B × its length."""
        return {name: tokenize(*each, texts).input_ids for name, each in self.tokenized.items()}

    def cut_off(self, text: str) -> str:
        tokenizer, length = next(iter(self.tokenized.values()))
        ids = tokenizer(text).input_ids
        return str(tokenizer.decode(ids[length - 1 : -1])) if len(ids) > length else ""

    def describe(self) -> dict[str, str]:
        return {"base_quantization": self.quantization} if self.quantization else {}

    def fingerprints(self) -> dict[str, str]:
        shift, factor = self.vae_scale
        vae = f"{fingerprint(self.vae)} × {factor:g}" + (f" − {shift:g}" if shift else "")
        return {"vae": vae, "tokenizer": self.tokenizer_hash()[:32]}

    def tokenizer_hash(self) -> str:
        """Distinguishes tokenizers that could give other ids: by vocabulary, length, special tokens and samples."""
        identity = [
            [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, tokenizer.special_tokens_map]
            for tokenizer in self.tokenizers
        ]
        probes = self.probe_ids()
        written = json.dumps([identity, probes], sort_keys=True, default=str)
        return hashlib.sha256(written.encode()).hexdigest()

    def probe_ids(self) -> Any:
        """The tokens of texts in which tokenizers differ."""
        return {name: ids.tolist() for name, ids in self.prepare_text(PROBES).items()}

    def prompt_arguments(self, positive: TextCondition, negative: TextCondition | None) -> dict[str, Any]:
        texts = {"": positive} if negative is None else {"": positive, "negative_": negative}
        found = {
            f"{prefix}{name}": value
            for prefix, text in texts.items()
            for name, value in (
                ("prompt_embeds", text.states_BLD),
                ("pooled_prompt_embeds", text.pooled_BE),
                ("prompt_attention_mask", text.mask_BL),
            )
        }
        return {name: value for name, value in found.items() if value is not None}

    @contextmanager
    def before_calls(self, function: Callable[[DenoiserCall], None], negative: TextCondition | None) -> Iterator[None]:
        names = list(inspect.signature(self.denoiser.forward).parameters)

        def hook(denoiser: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = dict(zip(names, inputs, strict=False)) | named
            sample, time = given[names[0]], given["timestep"]
            part = self.part_of_call(given["encoder_hidden_states"], negative)
            function(DenoiserCall(torch.as_tensor(time, device=sample.device).expand(len(sample)), part))

        handle = self.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def part_of_call(self, states_BLD: Tensor, negative: TextCondition | None) -> Part:
        """The part of the guided batch that a call with these text states computes."""
        if negative is None:
            return "positive"
        if self.guidance_calls == "joint":
            return "joint"
        return "negative" if states_BLD.data_ptr() == negative.states_BLD.data_ptr() else "positive"

    def make_sampler(self) -> Any:
        """The scheduler that the pipeline samples with."""
        return type(self.scheduler).from_config(self.scheduler.config)

    def pipeline(self, pipeline_class: Any = None, **parts: Any) -> Any:
        """Samples on the checkpoint's own schedule.

        A VAE with its own ``vae_dtype`` cannot read the pipeline's latents: call it with ``output_type="latent"`` and
        give the result to ``decode_latents``.
        """
        own = {name: getattr(self, name) for name in self.part_names} | {"scheduler": self.make_sampler()}
        pipeline_class = pipeline_class or self.pipeline_class
        known = inspect.signature(pipeline_class.__init__).parameters  # not all know the absent ones
        pipeline = pipeline_class(**own, **{name: x for name, x in self.absent.items() if name in known}, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


# letter case, accents, punctuation, digits, and more than fits
PROBES = ["", "A naïve red-haired girl's café, 1987!", "über 東京 🙂 " * 40]


def tokenize(tokenizer: Any, length: int, texts: list[str]) -> Any:
    """Tokens, cut and padded to ``length``."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def class_of(path: str, part: str) -> Any:
    """The class of diffusers or transformers that a pipeline's index names."""
    library, kind = read_index(path, "base.path")[part]
    return getattr(import_module(library), kind)
