"""IP-Adapter (Ye et al. 2023): our own and published adapter files, decoupled and simple, with every kind of tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ipa.errors import MissingWeights
from ipa.evaluation.methods.method import Method, Prompt
from ipa.evaluation.methods.weights import options_renamed
from ipa.export.loading import load_model
from ipa.export.reading import read_adapter
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, generate
from ipa.types import Features
from ipa.weights import count_parameters

OPTIONS = {
    "base.path": "method.base",
    "base.config": "method.base_config",
    "encoder.path": "method.encoder",
    "encoder.name": "method.encoder",
    "encoder.pretrained": "method.encoder_weights",
}


class IPAdapterMethod(Method):
    """``sampling.scale`` is λ; 0 is the base without the image."""

    name: ClassVar[str] = "IP-Adapter"
    uses_text: ClassVar[bool] = True
    rescales_guidance: ClassVar[bool] = True
    model: IPAdapterModel

    def __init__(self, model: IPAdapterModel, source: str = "", **parts: nn.Module) -> None:
        super().__init__(source, model=model, **parts)

    @classmethod
    def from_pretrained(cls, adapter: str | None, dtype: str = "float32", **parts: Any) -> Self:
        """``parts`` are those of ``load_model``. Raises MissingWeights, and UserError for parts that do not fit."""
        method = cls(load(adapter, dtype=dtype, **parts), str(adapter))
        method.recorded = read_attention(read_adapter(Path(str(adapter))).metadata)
        return method

    @property
    def trained(self) -> int:
        return count_parameters(self.model.trainable)

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingOptions) -> Tensor:
        texts, seeds = [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts]
        return generate(self.model, self.encode(prompts), texts, seeds, sampling)

    def encode(self, prompts: Sequence[Prompt]) -> Features:
        """What the adapter's head reads of the images."""
        size_px, fit = self.model.encoder.image_size_px, self.model.reference_fit
        references_B3HW = torch.stack([prompt.cut(size_px, fit) for prompt in prompts])
        return self.model.encode_reference(references_B3HW.to(self.model.device))


def read_attention(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the training measured last, if it did: ‖λ · image attention‖ / ‖text attention‖ by block."""
    try:
        found = json.loads(metadata.get("image_attention", "{}"))
        blocks = {str(block): float(ratio) for block, ratio in found.items()}
    except (ValueError, TypeError, AttributeError):
        return {}
    return {"image_attention": blocks} if blocks else {}


def load(adapter: str | None, **options: Any) -> IPAdapterModel:
    """``load_model`` whose errors name this method's options."""
    if adapter is None or not Path(adapter).is_file():
        what = "no adapter is given" if adapter is None else f"adapter={adapter}: no such file"
        raise MissingWeights(
            f"{what}. Give adapter=FILE: a run's adapter.safetensors, one of demo/adapters/, or a published one "
            "(huggingface.co/h94/IP-Adapter) with method.base= and method.encoder="
        )
    with options_renamed(OPTIONS):
        return load_model(Path(adapter), **options)
