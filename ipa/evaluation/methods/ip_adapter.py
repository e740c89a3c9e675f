"""IP-Adapter (Ye et al. 2023): adapter files of ours and published ones, decoupled and simple, all kinds of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ipa.data.images.transforms import Opened, fit_reference
from ipa.evaluation.methods.method import MissingWeights, Prompt, Sampling
from ipa.export.loading import load_model
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, generate
from ipa.types import Features

KEYS = {
    "base.path": "method.base",
    "base.config": "method.base_config",
    "encoder.path": "method.encoder",
    "encoder.name": "method.encoder",
    "encoder.pretrained": "method.encoder_weights",
}


class IPAdapterMethod:
    """``sampling.scale`` is λ; 0 is the base without the image."""

    name: ClassVar[str] = "IP-Adapter"
    uses_text: ClassVar[bool] = True

    def __init__(self, model: IPAdapterModel, source: str = "") -> None:
        self.model, self.source = model, source

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | None,
        base: str | None = None,
        encoder: str | None = None,
        encoder_weights: str | None = None,
        base_config: str | None = None,
        dtype: str = "float32",
    ) -> Self:
        """An adapter file; base and encoder are those of its metadata unless given.

        Raises ``MissingWeights`` for what is neither here nor to be had, ValueError for parts that do not fit.
        """
        if adapter is None or not Path(adapter).is_file():
            what = "no adapter is given" if adapter is None else f"adapter={adapter}: no such file"
            raise MissingWeights(
                f"{what}. Give adapter=FILE: a run's adapter.safetensors, one of demo/adapters/, or a published one "
                "(huggingface.co/h94/IP-Adapter) with method.base= and method.encoder="
            )
        try:
            return cls(load_model(Path(adapter), base, encoder, encoder_weights, base_config, dtype), adapter)
        except OSError as error:
            raise MissingWeights(renamed(str(error))) from error

    @property
    def trained(self) -> int:
        return self.model.count_trainable()

    def to(self, device: Any) -> Self:
        self.model.to(device)
        return self

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
        options = SamplingOptions(
            num_steps=sampling.num_steps,
            guidance=sampling.guidance,
            scale=sampling.scale,
            image_size_px=sampling.image_size_px,
            batch_size=len(prompts),
        )
        texts, seeds = [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts]
        return generate(self.model, self.encode(prompts), texts, seeds, options)

    def encode(self, prompts: Sequence[Prompt]) -> Features:
        """What the adapter's head reads of the pictures."""
        edge, fit = self.model.encoder.image_size_px, self.model.reference_fit
        references_B3HW = torch.stack([fit_reference(whole(prompt.image_3HW), edge, fit) for prompt in prompts])
        return self.model.encode_reference(references_B3HW.to(self.model.device))


def renamed(message: str) -> str:
    """What loading complains of, with the keys that its parts have here."""
    for theirs, ours in KEYS.items():
        message = message.replace(theirs, ours)
    return message


def whole(image_3HW: Tensor) -> Opened:
    size = (image_3HW.shape[2], image_3HW.shape[1])
    return Opened(image_3HW, size, size)
