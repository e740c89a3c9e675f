"""Systems around Stable Diffusion, and the form that two of them have: image tokens after those of the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ipa.encoders.vision_model import VisionModelEncoder
from ipa.evaluation.methods.method import Method, Prompt, draw_start
from ipa.evaluation.methods.weights import load_base, load_image_encoder, load_module
from ipa.families.stable_diffusion import StableDiffusion
from ipa.sampling import SamplingOptions
from ipa.types import TextCondition, to_unit_range
from ipa.weights import count_parameters


@dataclass(frozen=True)
class Start:
    """Starting noise on the base's device and in its precision, and the generators for what is drawn after it."""

    noise_BCHW: Tensor
    generators: list[torch.Generator]
    size_px: int


class StableDiffusionMethod(Method):
    """A system around Stable Diffusion: DDIM on the checkpoint's own schedule, each image's noise from its seed."""

    family: StableDiffusion
    rescales_guidance = True

    @abstractmethod
    def sample_latents(self, prompts: Sequence[Prompt], start: Start, sampling: SamplingOptions) -> Tensor: ...

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingOptions) -> Tensor:
        size_px = sampling.image_size_px or self.family.image_size_px
        noise_BCHW, generators = draw_start(prompts, self.family.latent_shape(size_px))
        start = Start(noise_BCHW.to(self.family.device, self.family.dtype), generators, size_px)
        return self.family.decode_latents(self.sample_latents(prompts, start, sampling))

    def text_states(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Two states_BLD: of the prompts' texts and of the empty text."""
        texts = [prompt.text for prompt in prompts]
        return self.family.encode_text(texts).states_BLD, self.family.encode_text([""] * len(texts)).states_BLD

    def call(
        self, pipeline: Any, states: tuple[Tensor, Tensor], start: Start, sampling: SamplingOptions, **more: Any
    ) -> Tensor:
        """Latents from a pipeline of diffusers, with the conditional and the unconditional states_BLD."""
        positive, negative = (TextCondition(states_BLD) for states_BLD in states)
        return pipeline(
            **self.family.prompt_arguments(positive, negative if sampling.guidance > 1 else None),
            **self.pipeline_arguments(sampling, start.size_px),
            **more,
            latents=start.noise_BCHW,
            output_type="latent",
        ).images


class ClipPromptTokens(StableDiffusionMethod):
    """Stable Diffusion that reads tokens after those of the text, which an adapter makes from a CLIP image encoder.

    ``published`` names the adapter's file in messages, and the prefix of its weights.
    """

    uses_text = True
    encoder: VisionModelEncoder
    adapter: nn.Module
    make_adapter: ClassVar[Callable[[], nn.Module]]
    published: ClassVar[tuple[str, str]]

    def __init__(
        self, family: StableDiffusion, encoder: VisionModelEncoder, adapter: nn.Module, source: str = ""
    ) -> None:
        super().__init__(source, family=family, encoder=encoder, adapter=adapter)

    @classmethod
    def from_pretrained(cls, base: str, image_encoder: str, adapter: str, dtype: str = "float16") -> Self:
        """Raises MissingWeights, and UserError for files of something else."""
        loaded = cls.load_adapter(adapter)
        family, encoder = load_base(base, dtype), load_image_encoder(image_encoder, dtype)
        return cls(family, encoder, loaded.to(family.dtype), f"{adapter} on {base}")

    @classmethod
    def load_adapter(cls, path: str) -> nn.Module:
        return load_module(cls.make_adapter, path, *cls.published)

    @property
    def trained(self) -> int:
        return count_parameters(self.adapter)

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt], scale: float) -> tuple[Tensor, Tensor]:
        """tokens_BTD of the images and of "no image", both weighted with λ."""

    def states(self, prompts: Sequence[Prompt], scale: float) -> tuple[Tensor, Tensor]:
        """The whole context of the conditional and of the unconditional half."""
        pairs = zip(self.text_states(prompts), self.encode(prompts, scale), strict=True)
        positive, negative = (torch.cat(pair, 1) for pair in pairs)
        return positive, negative

    def sample_latents(self, prompts: Sequence[Prompt], start: Start, sampling: SamplingOptions) -> Tensor:
        return self.call(self.family.pipeline(), self.states(prompts, sampling.scale), start, sampling)

    def squares(self, prompts: Sequence[Prompt]) -> Tensor:
        """The encoder's input on the base's device."""
        return cut_squares(prompts, self.encoder.image_size_px).to(self.family.device)


def cut_squares(prompts: Sequence[Prompt], size_px: int) -> Tensor:
    """image_B3HW in [-1, 1]: shortest side resized (bicubic), centre crop, as CLIP is preprocessed."""
    return to_unit_range(torch.stack([prompt.cut(size_px) for prompt in prompts]))
