"""IP-Adapter with a ControlNet (Ye et al. 2023, section 4.3.2): the picture says what, its own edges say where.

    ε = UNet(x_t, text, image tokens; + w · ControlNet(x_t, text, edges))

Image tokens and λ reach the UNet alone: a ControlNet has no branches, and of a simple adapter's context it gets the
text without the tokens behind it, as published code cuts them off there.

    method = IPAdapterControl.from_pretrained("runs/…/adapter.safetensors")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from torch import Tensor

from ipa.data.images.transforms import fit_reference
from ipa.errors import UserError
from ipa.evaluation.methods.controlnet_shuffle import load_controlnet
from ipa.evaluation.methods.edges import Canny
from ipa.evaluation.methods.ip_adapter import IPAdapterMethod, whole
from ipa.evaluation.methods.method import Prompt, Sampling
from ipa.model import IPAdapterModel
from ipa.sampling import draw_noise, prompt_arguments

PIPELINES: dict[str, Any] = {
    "stable_diffusion": StableDiffusionControlNetPipeline,
    "sdxl": StableDiffusionXLControlNetPipeline,
}


class IPAdapterControl(IPAdapterMethod):
    """``sampling.scale`` is λ; ``control_weight`` is the ControlNet's, and 0 leaves the adapter alone."""

    name: ClassVar[str] = "ip_adapter_control"

    def __init__(
        self,
        model: IPAdapterModel,
        controlnet: Any,
        source: str = "",
        control_weight: float = 1.0,
        edges: Canny | None = None,
    ) -> None:
        super().__init__(model, source)
        check_controlnet(controlnet, model)
        self.controlnet, self.control_weight = controlnet.eval().requires_grad_(False), control_weight
        self.edges = edges or Canny()

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | None,
        base: str | None = None,
        encoder: str | None = None,
        encoder_weights: str | None = None,
        base_config: str | None = None,
        dtype: str = "float32",
        controlnet: str = "lllyasviel/control_v11p_sd15_canny",
        control_weight: float = 1.0,
        edge_low: float = 100.0,
        edge_high: float = 200.0,
        edge_blur_px: float = 0.0,
    ) -> Self:
        """As ``IPAdapterMethod`` has it; ``controlnet`` is a hub id or a folder, of one that reads edges."""
        edges = Canny(edge_low, edge_high, edge_blur_px)
        alone = IPAdapterMethod.from_pretrained(adapter, base, encoder, encoder_weights, base_config, dtype)
        loaded = load_controlnet(controlnet, dtype)
        return cls(alone.model, loaded, f"{alone.source} with {controlnet}", control_weight, edges)

    def to(self, device: Any) -> Self:
        self.controlnet.to(device)
        return super().to(device)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
        family, texts = self.model.family, [prompt.text for prompt in prompts]
        size_px, guided = sampling.image_size_px or family.image_size_px, sampling.guidance > 1
        noise_BCHW = draw_noise(family.latent_shape(size_px), [prompt.seed for prompt in prompts])
        features = [self.encode(prompts)]
        with prompt_arguments(self.model, features, texts, sampling.scale, size_px, guided) as arguments:
            length = family.tokenize([""]).shape[-1]
            with reading_text_alone(self.controlnet, length):
                latents_BCHW = self.pipeline()(
                    **arguments,
                    image=self.controls(prompts, size_px).to(self.model.device),
                    controlnet_conditioning_scale=float(self.control_weight),
                    latents=noise_BCHW.to(arguments["prompt_embeds"]),
                    num_inference_steps=sampling.num_steps,
                    guidance_scale=sampling.guidance,
                    height=size_px,
                    width=size_px,
                    output_type="latent",
                ).images
        return family.decode_latents(latents_BCHW).cpu()

    def controls(self, prompts: Sequence[Prompt], size_px: int) -> Tensor:
        """Edges of the pictures' middle squares: control_B3HW in [0, 1]."""
        squares = (fit_reference(whole(prompt.image_3HW), size_px, "crop") for prompt in prompts)
        return torch.stack([self.edges(square_3HW).expand(3, -1, -1) for square_3HW in squares])

    def pipeline(self) -> Any:
        family = self.model.family
        parts = {name: getattr(family, name) for name in family.part_names}
        parts |= {"scheduler": family.make_sampler(), "controlnet": self.controlnet}
        pipeline = PIPELINES[family.name](**{**parts, **family.absent})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def check_controlnet(controlnet: Any, model: IPAdapterModel) -> None:
    """Raises UserError for one of another base, and for one that tells no places."""
    theirs, ours = controlnet.config.cross_attention_dim, model.family.context_width
    if theirs != ours:
        raise UserError(
            f"method.controlnet: it reads text that is {theirs} wide, and the base's is {ours}: give one for this base"
        )
    if controlnet.config.global_pool_conditions:
        raise UserError(
            "method.controlnet: it pools its residuals over the picture (global_pool_conditions in its config.json), "
            "so it tells no structure: give one that was trained on edges, such as lllyasviel/control_v11p_sd15_canny"
        )


@contextmanager
def reading_text_alone(controlnet: Any, length: int) -> Iterator[None]:
    """While inside, the ControlNet gets the first ``length`` tokens of its context only."""

    def cut(module: Any, arguments: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**given, "encoder_hidden_states": given["encoder_hidden_states"][:, :length]}

    hook = controlnet.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
