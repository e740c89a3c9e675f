"""The scoring network: a CLIP that no adapter reads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ipa.encoders.open_clip import resolve_name
from ipa.errors import MissingWeights, brief
from ipa.metrics.networks import ImageNetwork


class ClipScorer(ImageNetwork):
    """Unit-length image and text embeddings of an open_clip model, with its own preprocessing."""

    def __init__(self, clip: Any, tokenizer: Any, preprocess: dict[str, Any], name: str = "") -> None:
        size = preprocess["size"]
        super().__init__(size if isinstance(size, int) else size[0], None, preprocess["mean"], preprocess["std"])
        self.clip, self.tokenizer, self.name = clip, tokenizer, name
        self.freeze()

    @classmethod
    def from_pretrained(cls, name: str, pretrained: str | None = None) -> Self:
        """Load open_clip's ``name``: built-in, ``hf-hub:…`` or ``local-dir:FOLDER``. Raises MissingWeights."""
        import open_clip

        name = resolve_name(name, "judge.name")
        options: dict[str, Any] = {"pretrained": pretrained, "precision": "fp32"}
        try:
            clip = open_clip.create_model(name, **options, require_pretrained=True, weights_only=True)
        except RuntimeError as error:  # what open_clip raises if a download fails
            raise MissingWeights(
                f"judge.name={name} judge.pretrained={pretrained}: {brief(error)}. Give a folder with "
                "judge.name=local-dir:FOLDER judge.pretrained=null, or omit the scores: judge=null"
            ) from error
        return cls(clip, open_clip.get_tokenizer(name), open_clip.get_model_preprocess_cfg(clip), name)

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[Self]:
        """Moved to ``device`` while inside, and back to the CPU afterwards, since training needs the memory."""
        try:
            yield self.to(device)
        finally:
            self.to("cpu")

    def _embed(self, prepared_B3HW: Tensor) -> Tensor:
        return F.normalize(self.clip.encode_image(prepared_B3HW), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """embedding_BE of length one."""
        return F.normalize(self.clip.encode_text(self.tokenizer(texts).to(self.mean.device)), dim=-1)


@functools.cache
def load_scorer(name: str, pretrained: str | None = None) -> ClipScorer:
    """One scorer per name and process, shared by all metrics."""
    return ClipScorer.from_pretrained(name, pretrained)
