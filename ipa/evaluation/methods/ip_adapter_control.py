"""IP-Adapter with a ControlNet (Ye et al. 2023, section 4.3.2): content from the image, structure from its edges.

    ε = UNet(x_t, text, image tokens; + w · ControlNet(x_t, text, edges))

Image tokens and λ only reach the UNet: a ControlNet has no branches. With a simple adapter, whose tokens are in the
context, the ControlNet gets the text part alone, as in published code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ipa.errors import UserError
from ipa.evaluation.methods.edges import canny
from ipa.evaluation.methods.ip_adapter import IPAdapterMethod, load
from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.weights import controlnet_pipeline, load_controlnet
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, prompt_arguments, run_pipeline
from ipa.types import ImageCondition


class IPAdapterControl(IPAdapterMethod):
    """``sampling.scale`` is λ; ``control_weight`` is the ControlNet's, 0 turns it off."""

    name: ClassVar[str] = "ip_adapter_control"
    rescales_guidance: ClassVar[bool] = False
    controlnet: Any

    def __init__(
        self,
        model: IPAdapterModel,
        controlnet: Any,
        source: str = "",
        control_weight: float = 1.0,
        edges: Callable[[Tensor], Tensor] = canny,
    ) -> None:
        check_controlnet(controlnet, model)
        super().__init__(model, source, controlnet=controlnet)
        self.control_weight, self.edges = control_weight, edges

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | None,
        dtype: str = "float32",
        controlnet: str = "lllyasviel/control_v11p_sd15_canny",
        control_weight: float = 1.0,
        edge_low: float = 100.0,
        edge_high: float = 200.0,
        **parts: Any,
    ) -> Self:
        """As ``IPAdapterMethod``; ``controlnet`` is a hub id or a folder of one that was trained on edges."""
        edges = partial(canny, low=edge_low, high=edge_high)
        model, loaded = load(adapter, dtype=dtype, **parts), load_controlnet(controlnet, dtype)
        return cls(model, loaded, f"{adapter} with {controlnet}", control_weight, edges)

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingOptions) -> Tensor:
        family, texts, seeds = self.model.family, [each.text for each in prompts], [each.seed for each in prompts]
        size = (sampling.image_size_px or family.image_size_px,) * 2
        condition = ImageCondition([self.encode(prompts)], scale=sampling.scale)
        control: dict[str, Any] = {"image": self.controls(prompts, size[0]).to(self.model.device)}
        control["controlnet_conditioning_scale"] = float(self.control_weight)
        pipeline = controlnet_pipeline(family, self.controlnet)
        text_length = family.encode_text([""]).states_BLD.shape[1]

        def cut(module: Any, inputs: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return inputs, {**given, "encoder_hidden_states": given["encoder_hidden_states"][:, :text_length]}

        with (
            prompt_arguments([(self.model, [condition])], texts, size, sampling.guidance > 1) as arguments,
            self.controlnet.register_forward_pre_hook(cut, with_kwargs=True),  # removed afterwards
        ):
            return run_pipeline(family, pipeline, arguments | control, seeds, size, sampling)

    def controls(self, prompts: Sequence[Prompt], size_px: int) -> Tensor:
        """Edges of the images' centre squares: control_B3HW in [0, 1]."""
        return torch.stack([self.edges(prompt.cut(size_px)).expand(3, -1, -1) for prompt in prompts])


def check_controlnet(controlnet: Any, model: IPAdapterModel) -> None:
    """Raise UserError for one that was made for another base, or that carries no structure."""
    theirs, ours = controlnet.config.cross_attention_dim, model.family.context_width
    if theirs != ours:
        raise UserError(
            f"method.controlnet: its context is {theirs} wide, the base's is {ours}: give one for this base"
        )
    if controlnet.config.global_pool_conditions:
        raise UserError(
            "method.controlnet: it pools its residuals over the image (global_pool_conditions in its config.json), "
            "so it carries no structure: give one that was trained on edges, such as lllyasviel/control_v11p_sd15_canny"
        )
