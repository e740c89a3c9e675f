"""ControlNet reference-only: no trained weights; self-attention also reads a reference image.

Every step calls the UNet twice. The first call gets the reference at the step's noise level and stores the input of
each self-attention layer, r; the second makes the image, and its layers read

    x ← Attention(Q(x), K([x; r]), V([x; r]))

The unconditional half of guidance keeps ``style_fidelity`` of its own attention: 0 follows the text more, 1 the
reference. From Mikubill/sd-webui-controlnet, discussion 1236. It has no λ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.prompt_tokens import StableDiffusionMethod, Start, cut_squares
from ipa.evaluation.methods.weights import load_base
from ipa.families.stable_diffusion import StableDiffusion
from ipa.sampling import SamplingOptions


class ReferenceOnly(StableDiffusionMethod):
    """The reference is cropped to the image's square. The UNet is restored after each call."""

    name = "reference_only"
    uses_text = True
    trained = 0

    def __init__(self, family: StableDiffusion, source: str = "", style_fidelity: float = 0.5) -> None:
        super().__init__(source, family=family)
        self.style_fidelity = style_fidelity

    @classmethod
    def from_pretrained(cls, base: str, style_fidelity: float = 0.5, dtype: str = "float16") -> Self:
        """Raises MissingWeights for the base."""
        return cls(load_base(base, dtype), base, style_fidelity)

    def sample_latents(self, prompts: Sequence[Prompt], start: Start, sampling: SamplingOptions) -> Tensor:
        with TwoPasses(self.noised_references(prompts, start), self.style_fidelity).installed(self.family.unet):
            return self.call(self.family.pipeline(), self.text_states(prompts), start, sampling)

    def noised_references(self, prompts: Sequence[Prompt], start: Start) -> Callable[[Tensor], Tensor]:
        """Timestep → the references at its noise level, with noise from each image's own generator."""
        noise_BCHW = start.noise_BCHW

        def draw() -> Tensor:
            shape = noise_BCHW.shape[1:]
            return torch.stack([torch.randn(shape, generator=each) for each in start.generators]).to(noise_BCHW)

        posterior = self.family.encode_pixels(cut_squares(prompts, start.size_px).to(noise_BCHW.device))
        latents_BCHW = posterior.sample(draw()).to(noise_BCHW)
        scheduler: Any = self.family.make_sampler()
        return lambda timestep: scheduler.add_noise(latents_BCHW, draw(), timestep.reshape(1))


class TwoPasses:
    """Lets a UNet store the reference before every call, and read it in the call."""

    def __init__(self, noised: Callable[[Tensor], Tensor], style_fidelity: float) -> None:
        self.noised, self.style_fidelity = noised, style_fidelity
        self.storing, self.num_unconditional = False, 0
        self.seen: dict[nn.Module, Any] = {}

    @contextmanager
    def installed(self, unet: Any) -> Iterator[None]:
        """Removes the hooks afterwards, also after an error."""
        with ExitStack() as stack:
            stack.callback(unet.register_forward_pre_hook(self.store_first, with_kwargs=True).remove)
            for attention in self_attentions(unet):
                stack.callback(attention.register_forward_pre_hook(self.extend, with_kwargs=True).remove)
                stack.callback(attention.register_forward_hook(self.soften).remove)
            yield

    def store_first(self, unet: Any, inputs: tuple[Any, ...], given: dict[str, Any]) -> None:
        latents, timestep = inputs
        reference_BCHW = self.noised(timestep)
        halves = len(latents) // len(reference_BCHW)  # with guidance the unconditional one comes first
        self.num_unconditional = len(reference_BCHW) * (halves - 1)
        self.storing = True
        unet.forward(reference_BCHW.repeat(halves, 1, 1, 1), timestep, **given)
        self.storing = False

    def extend(self, attention: Any, inputs: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Let a self-attention layer also read what it got of the reference."""
        (x_BPD,) = inputs
        if self.storing:
            self.seen[attention] = x_BPD
            return None
        return inputs, {**given, "encoder_hidden_states": torch.cat([x_BPD, self.seen[attention]], 1)}

    def soften(self, attention: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Unconditional rows keep ``style_fidelity`` of their own attention."""
        rows, (x_BPD,) = self.num_unconditional, inputs
        if self.storing or not rows or not self.style_fidelity:
            return None
        own = attention.processor(attention, x_BPD[:rows])
        return torch.cat([torch.lerp(output[:rows], own, self.style_fidelity), output[rows:]])


def self_attentions(unet: nn.Module) -> list[Any]:
    return [module.attn1 for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
