"""Chroma as a frozen family: FLUX without guidance embedding and pooled text, with a real unconditional branch.

family = Chroma.from_pretrained("lodestones/Chroma1-HD", dtype="bfloat16")

The transformer reads T5's states and its mask, which keeps the text and one padding token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import ChromaImg2ImgPipeline, ChromaPipeline, ChromaTransformer2DModel
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from torch import Tensor, nn

from ipa.families.flow import FlowFamily, require
from ipa.families.flux import Flux
from ipa.families.pipeline_family import tokenize
from ipa.types import TextCondition, TextInputs


class Chroma(Flux):
    name = "chroma"
    title = "Chroma"
    advice = "base=chroma (recipe=flux)"
    guidance = 5.0
    guidance_option = "guidance_scale"
    pipeline_class = ChromaPipeline
    # diffusers' automatic choice does not know Chroma; its ChromaInpaintPipeline (0.42) ends in an AttributeError
    task_pipelines: ClassVar = {"start_image": ChromaImg2ImgPipeline}
    denoiser_class = ChromaTransformer2DModel
    needs: ClassVar = {"text_encoder": "its T5 text encoder", "tokenizer": "the T5 tokenizer", "vae": "its VAE"}
    t5_parts = ("text_encoder", "tokenizer")
    usual_text_tokens = 512

    @property
    def tokenized(self) -> dict[str, tuple[Any, int]]:
        return {"t5_ids": (self.tokenizer, self.text_tokens)}

    def prepare_text(self, texts: list[str]) -> TextInputs:
        """``t5_ids`` and ``t5_mask``, 1 for the tokens of the text."""
        found = tokenize(self.tokenizer, self.text_tokens, texts)
        return {"t5_ids": found.input_ids, "t5_mask": found.attention_mask}

    @torch.no_grad()
    def text_states(self, inputs: TextInputs) -> TextInputs:
        """``t5`` and its ``mask``; raises UserError for inputs without ``t5_mask``, as a cache of FLUX has."""
        t5 = self.text_encoder
        mask_BL = require(inputs.get("t5_mask"), "Chroma's mask of the text (t5_mask)").to(t5.device)
        states_BLD = t5(inputs["t5_ids"].to(t5.device), attention_mask=mask_BL)[0]
        read_BL = torch.arange(mask_BL.shape[1], device=t5.device) <= mask_BL.sum(1, keepdim=True)
        return {"t5": states_BLD, "mask": read_BL.int()}

    def text_condition(self, states: TextInputs, size_B6: Tensor | None = None) -> TextCondition:
        mask_BL = require(states.get("mask"), "Chroma's mask of the text")
        return TextCondition(states["t5"], mask_BL=mask_BL.bool())

    def conditions(self, text: TextCondition, tokens_BNK: Tensor) -> dict[str, Any]:
        mask_BL = require(text.mask_BL, "Chroma's mask of the text")
        image_BN = mask_BL.new_ones(len(tokens_BNK), tokens_BNK.shape[1])
        return {"attention_mask": torch.cat([mask_BL, image_BN], dim=1)}

    def checkpoint_gradients(self, function: Callable[..., Any]) -> None:
        """diffusers recomputes single-stream blocks without their mask, which is added here."""
        masks: list[Tensor | None] = [None]

        def remember(module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
            masks[0] = named.get("attention_mask")

        def run_again(block: nn.Module, *inputs: Any) -> Any:
            return function(block, *inputs, *(masks if isinstance(block, ChromaSingleTransformerBlock) else ()))

        self.transformer.register_forward_pre_hook(remember, with_kwargs=True)
        super().checkpoint_gradients(run_again)

    def guidance_arguments(self, guidance: float, guidance_rescale: float = 0.0) -> dict[str, Any]:
        return FlowFamily.guidance_arguments(self, guidance, guidance_rescale)

    def describe(self) -> dict[str, str]:
        return {name: value for name, value in super().describe().items() if name != "train_guidance"}
