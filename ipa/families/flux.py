"""FLUX.1 as a frozen family: dev (with guidance embedding), schnell, Krea, and their fine-tuned variants.

family = Flux.from_pretrained("black-forest-labs/FLUX.1-dev", dtype="bfloat16")

Text: T5 states without mask, and CLIP's pooled output. Guidance: FLUX.1-dev is distilled with an embedded scale
(``train_guidance``, ``sample_guidance``); classifier-free guidance on top of it (``sampling.guidance`` above 1) calls
the transformer twice per step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from ipa.errors import UserError
from ipa.families.flow import FlowFamily, FlowTimes, require
from ipa.families.flux_attention import FluxHost, InstantXHost
from ipa.types import BaseWidths, TextCondition, TextInputs

HOSTS = ("double", "all")


class Flux(FlowFamily):
    """``hosts``: double (XLabs' layout: the double-stream blocks), or all (InstantX': single-stream blocks, too).

    ``text_tokens`` is the length of T5's text, by default 512, or 256 without guidance embedding (schnell).
    ``train_guidance`` and ``sample_guidance`` are the embedded guidance of training and sampling, which only dev has.
    ``key_std`` and ``value_std`` initialise K′ and V′.
    """

    name = "flux"
    title = "FLUX.1"
    advice = "base=flux_dev or base=flux_schnell (recipe=flux)"
    guidance_calls = "separate"
    guidance = 1.0
    time_factor = 1.0
    guidance_option = "true_cfg_scale"
    pipeline_class: ClassVar[Any] = FluxPipeline
    denoiser_class: ClassVar[Any] = FluxTransformer2DModel
    absent: ClassVar = {"image_encoder": None, "feature_extractor": None}
    needs: ClassVar = {
        "text_encoder": "its CLIP text encoder",
        "text_encoder_2": "its T5 text encoder",
        "tokenizer_2": "the T5 tokenizer",
        "vae": "its VAE",
    }
    t5_parts = ("text_encoder_2", "tokenizer_2")

    text_encoder: Any
    tokenizer: Any

    def __init__(
        self,
        source: str = "",
        times: FlowTimes | None = None,
        hosts: str = "double",
        text_tokens: int | None = None,
        train_guidance: float = 1.0,
        sample_guidance: float = 3.5,
        key_std: float = 0.02,
        value_std: float = 0.0,
        **parts: Any,
    ) -> None:
        super().__init__(source, times, **parts)
        self.host_choice = check_hosts(hosts)
        self.text_tokens = text_tokens or min(self.usual_text_tokens, getattr(self, self.t5_parts[1]).model_max_length)
        self.branches = self.layout_of(hosts)
        self.train_guidance, self.sample_guidance = train_guidance, sample_guidance
        self.start = key_std, value_std

    @property
    def usual_text_tokens(self) -> int:
        return 512 if self.transformer.config.guidance_embeds else 256

    @classmethod
    def layout_of(cls, hosts: str) -> str:
        return {"double": "flux", "all": "instantx"}[check_hosts(hosts)]

    @classmethod
    def widths_of(cls, transformer: Any, hosts: str = "double", **options: Any) -> BaseWidths:
        context = transformer.config.joint_attention_dim
        found = find_hosts(transformer, hosts)
        return BaseWidths(context, [host.width for host in found], context, cls.layout_of(hosts))

    @classmethod
    def hosts_of(cls, transformer: Any) -> list[Any]:
        return find_hosts(transformer, "all")

    @property
    def context_width(self) -> int:
        return self.transformer.config.joint_attention_dim

    def hosts(self) -> list[Any]:
        return find_hosts(self.transformer, self.host_choice, self.start)

    def pack(self, latents_BCHW: Tensor) -> Tensor:
        """B × C × H × W → B × (H W / 4) × 4 C, each token channel-major."""
        return torch.nn.functional.pixel_unshuffle(latents_BCHW, self.patch).flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor, shape_CHW: tuple[int, int, int]) -> Tensor:
        _, height, width = shape_CHW
        tokens = packed.transpose(1, 2).unflatten(2, (height // self.patch, width // self.patch))
        return torch.nn.functional.pixel_shuffle(tokens, self.patch)

    @property
    def tokenized(self) -> dict[str, tuple[Any, int]]:
        clip = {"clip_ids": (self.tokenizer, self.tokenizer.model_max_length)}
        return {"t5_ids": (getattr(self, self.t5_parts[1]), self.text_tokens)} | clip

    @torch.no_grad()
    def text_states(self, inputs: TextInputs) -> TextInputs:
        """``t5``, its last states, all of which the transformer reads, and ``pooled``, CLIP's pooled output."""
        t5, clip = getattr(self, self.t5_parts[0]), self.text_encoder
        pooled_BE = clip(inputs["clip_ids"].to(clip.device)).pooler_output
        return {"t5": t5(inputs["t5_ids"].to(t5.device))[0], "pooled": pooled_BE}

    def text_condition(self, states: TextInputs, size_B6: Tensor | None = None) -> TextCondition:
        """This family has no size condition."""
        return TextCondition(states["t5"], states["pooled"])

    def denoise(self, noisy: Tensor, time_B: Tensor, text: TextCondition) -> Tensor:
        """Velocity, B × C × H × W as ``noisy``; the image tokens of a simple adapter share the text's position."""
        tokens_BNK, states_BLD = self.pack(noisy).to(self.dtype), text.states_BLD.to(self.dtype)
        velocity = self.transformer(
            hidden_states=tokens_BNK,
            encoder_hidden_states=states_BLD,
            timestep=time_B.to(self.dtype),
            img_ids=image_ids(noisy.shape[2] // self.patch, noisy.shape[3] // self.patch).to(tokens_BNK),
            txt_ids=tokens_BNK.new_zeros(states_BLD.shape[1], 3),
            **self.conditions(text, tokens_BNK),
        ).sample
        _, channels, height, width = noisy.shape
        return self.unpack(velocity, (channels, height, width))

    def conditions(self, text: TextCondition, tokens_BNK: Tensor) -> dict[str, Any]:
        """What the transformer reads besides the text's states."""
        guided = self.transformer.config.guidance_embeds
        guidance = tokens_BNK.new_full((len(tokens_BNK),), self.train_guidance) if guided else None
        pooled_BE = require(text.pooled_BE, "FLUX's pooled text")
        return {"pooled_projections": pooled_BE.to(self.dtype), "guidance": guidance}

    def guidance_arguments(self, guidance: float, guidance_rescale: float = 0.0) -> dict[str, Any]:
        return super().guidance_arguments(guidance, guidance_rescale) | {"guidance_scale": self.sample_guidance}

    def describe(self) -> dict[str, str]:
        return super().describe() | {"hosts": self.host_choice, "train_guidance": f"{self.train_guidance:g}"}


def check_hosts(hosts: str) -> str:
    if hosts not in HOSTS:
        raise UserError(f"base.hosts={hosts}: give double (XLabs' layout) or all (InstantX' layout)")
    return hosts


def find_hosts(transformer: Any, choice: str, start: tuple[float, float] = (0.02, 0.0)) -> list[FluxHost]:
    """The blocks that get a branch, in the published order: double-stream blocks first."""
    stacks = {"double": ("transformer_blocks",), "all": ("transformer_blocks", "single_transformer_blocks")}
    host_class, context = InstantXHost if choice == "all" else FluxHost, transformer.config.joint_attention_dim
    return [
        host_class(f"{stack}.{index}", block.attn, context, start)
        for stack in stacks[check_hosts(choice)]
        for index, block in enumerate(getattr(transformer, stack))
    ]


def image_ids(height: int, width: int) -> Tensor:
    """Positions of the image tokens, (H W) × 3: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
