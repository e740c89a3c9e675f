"""Stable Diffusion 3 and 3.5 as a frozen family: three text encoders, of which T5 may be left out.

family = StableDiffusion3.from_pretrained("stabilityai/stable-diffusion-3.5-medium", dtype="bfloat16")

Text: the penultimate states of both CLIPs next to each other, padded to T5's width and followed by T5's; the pooled
text of both (Esser et al. 2024, section 4).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from ipa.errors import UserError
from ipa.families.flow import FlowFamily, FlowTimes, require
from ipa.families.sd3_attention import SD3Host, find_hosts
from ipa.types import BaseWidths, TextCondition, TextInputs

TIME_WIDTH = 1280  # of the published adapters


class StableDiffusion3(FlowFamily):
    """``time_width`` is the width of the head's time embedding, which modulates the branches.

    Without ``t5`` its states are zeros, in training and sampling, and it is not loaded. ``text_tokens`` is the length
    of T5's text. ``key_std`` and ``value_std`` initialise K′ and V′.
    """

    name = "sd3"
    title = "Stable Diffusion 3"
    advice = "base=sd3_medium, base=sd35_medium or base=sd35_large (recipe=sd35_medium)"
    branches = "sd3"
    guidance = 7.0
    time_factor = 1000.0
    pipeline_class = StableDiffusion3Pipeline
    denoiser_class = SD3Transformer2DModel
    t5_parts = ("text_encoder_3", "tokenizer_3")
    absent: ClassVar = {"image_encoder": None, "feature_extractor": None}
    needs: ClassVar = {
        "text_encoder": "its first CLIP text encoder",
        "text_encoder_2": "its second CLIP text encoder",
        "text_encoder_3": "its T5 text encoder (base.t5=false trains without)",
        "vae": "its VAE",
    }

    text_encoder: Any
    text_encoder_2: Any
    text_encoder_3: Any
    tokenizer: Any
    tokenizer_2: Any
    tokenizer_3: Any

    def __init__(
        self,
        source: str = "",
        times: FlowTimes | None = None,
        time_width: int | None = None,
        t5: bool = True,
        text_tokens: int | None = None,
        key_std: float = 0.02,
        value_std: float = 0.0,
        **parts: Any,
    ) -> None:
        super().__init__(source, times, **parts)
        self.time_width, self.start = time_width or TIME_WIDTH, (key_std, value_std)
        self.text_tokens = text_tokens or (min(256, self.tokenizer_3.model_max_length) if t5 else 256)
        self.t5 = t5

    @classmethod
    def left_out(cls, t5: bool = True, **options: Any) -> dict[str, Any]:
        return {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}

    @classmethod
    def widths_of(cls, transformer: Any, time_width: int | None = None, **options: Any) -> BaseWidths:
        hosts = [host.width for host in find_hosts(transformer, time_width or TIME_WIDTH)]
        return BaseWidths(transformer.inner_dim, hosts, transformer.config.joint_attention_dim, cls.branches)

    @classmethod
    def hosts_of(cls, transformer: Any) -> list[Any]:
        return find_hosts(transformer, TIME_WIDTH)

    @property
    def context_width(self) -> int:
        return self.transformer.inner_dim

    @property
    def image_size_px(self) -> int:
        return self.transformer.config.sample_size * self.cell_px

    def check_size(self, image_size_px: int, option: str = "image_size_px") -> int:
        super().check_size(image_size_px, option)
        largest = self.transformer.config.pos_embed_max_size * self.size_multiple_px
        if image_size_px > largest:
            raise UserError(f"{option}={image_size_px}: the positions of the base {self.source} end at {largest} px")
        return image_size_px

    def hosts(self) -> list[SD3Host]:
        return find_hosts(self.transformer, self.time_width, self.start)

    @property
    def tokenized(self) -> dict[str, tuple[Any, int]]:
        clips = {"clip_ids": self.tokenizer, "clip_2_ids": self.tokenizer_2}
        t5 = {"t5_ids": (self.tokenizer_3, self.text_tokens)} if self.t5 else {}
        return t5 | {name: (each, each.model_max_length) for name, each in clips.items()}

    @torch.no_grad()
    def text_states(self, inputs: TextInputs) -> TextInputs:
        """``clip``, both CLIPs' states next to each other, ``pooled``, and with T5 ``t5``."""
        names = {"clip_ids": self.text_encoder, "clip_2_ids": self.text_encoder_2}
        clips = [part(inputs[name].to(part.device), output_hidden_states=True) for name, part in names.items()]
        states = {
            "clip": torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1),
            "pooled": torch.cat([clip.text_embeds for clip in clips], dim=-1),
        }
        if not self.t5:
            return states
        t5_ids = require(inputs.get("t5_ids"), "the T5 text (t5_ids)").to(self.text_encoder_3.device)
        return states | {"t5": self.text_encoder_3(t5_ids)[0]}

    def text_condition(self, states: TextInputs, size_B6: Tensor | None = None) -> TextCondition:
        """States of CLIP and T5, concatenated, and both CLIPs' pooled text."""
        clip_BLD = F.pad(states["clip"], (0, self.text_width - states["clip"].shape[-1]))
        if self.t5:
            t5_BLD = require(states.get("t5"), "the T5 text (t5)").to(clip_BLD)
        else:
            t5_BLD = clip_BLD.new_zeros(len(clip_BLD), self.text_tokens, self.text_width)
        return TextCondition(torch.cat([clip_BLD, t5_BLD], dim=1), states["pooled"])

    def describe(self) -> dict[str, str]:
        return super().describe() | ({} if self.t5 else {"t5": "false"})

    def denoise(self, noisy: Tensor, time_B: Tensor, text: TextCondition) -> Tensor:
        return self.transformer(
            hidden_states=noisy.to(self.dtype),
            encoder_hidden_states=text.states_BLD.to(self.dtype),
            pooled_projections=require(text.pooled_BE, "the pooled text").to(self.dtype),
            timestep=time_B,
        ).sample
