"""CLIP similarity of generated images to their image prompts and to the prompts' captions.

* clip_i: cosine of the embeddings of image and prompt, in [-1, 1] (Ye et al. 2023, section 4.1.3).
* clip_t: cosine of the embeddings of image and prompt's caption, whether or not generation used the caption.
* clip_score: CLIPScore, 2.5 · max(cosine, 0) of image and caption (Hessel et al. 2021, equation 1).
* retrieval_at_1: 1 where an image's nearest prompt, among all prompts seen, is its own; chance is 1 / prompts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ipa.errors import UserError
from ipa.metrics.clip import ClipScorer
from ipa.metrics.image_metric import Images, ItemMetric, first_of_each, image_keys

# states that retrieval compares over all images
COMPARED = ("generated_BE", "references_BE", "reference_keys_B")


class ClipCosines(ItemMetric):
    """clip_i and retrieval_at_1, and clip_t with each prompt's first caption, after ``prefix``, if there are any."""

    about_text: ClassVar[tuple[str, ...]] = ("clip_t",)

    network: ClipScorer

    def __init__(self, scorer: ClipScorer, prefix: str = "", **kwargs: Any) -> None:
        names = ("clip_i", *self.about_text, "retrieval_at_1")
        super().__init__(["clip_i", *self.about_text, *COMPARED], dict.fromkeys(names, True), network=scorer, **kwargs)
        self.prefix = prefix

    def measure(self, generated: Images, references: Images, captions: list[list[str]] | None) -> dict[str, Tensor]:
        generated_BE, references_BE = (self.network.embed_images(images) for images in (generated, references))
        return {
            "clip_i": (generated_BE * references_BE).sum(1),
            **({} if captions is None else self.measure_texts(generated_BE, captions)),
            "generated_BE": generated_BE,
            "references_BE": references_BE,
            "reference_keys_B": image_keys(references),
        }

    def measure_texts(self, generated_BE: Tensor, captions: list[list[str]]) -> dict[str, Tensor]:
        """State → value_B of each image and its own caption."""
        if not all(captions):
            raise UserError(f"image {[len(own) for own in captions].index(0)} of the batch has no caption")
        texts_BE = self.network.embed_texts([self.prefix + own[0] for own in captions])
        return {"clip_t": (generated_BE * texts_BE).sum(1)}

    def values(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        values = {name: rows[name] for name in self.higher if name in rows}
        return values | {"retrieval_at_1": retrieve(*(rows[name] for name in COMPARED))}


class ClipScores(ClipCosines):
    """``ClipCosines`` and clip_score, with the prefix from the definition of CLIPScore."""

    about_text: ClassVar[tuple[str, ...]] = ("clip_t", "clip_score")

    def __init__(self, scorer: ClipScorer, prefix: str = "A photo depicts ", **kwargs: Any) -> None:
        super().__init__(scorer, prefix, **kwargs)

    def measure_texts(self, generated_BE: Tensor, captions: list[list[str]]) -> dict[str, Tensor]:
        (cosine_B,) = super().measure_texts(generated_BE, captions).values()
        return {"clip_t": cosine_B, "clip_score": 2.5 * cosine_B.clamp(min=0)}


def retrieve(generated_BE: Tensor, references_BE: Tensor, reference_keys_B: Tensor) -> Tensor:
    """1 where the nearest reference is the image's own, else 0: hit_B. Equal keys mean the same reference."""
    first = first_of_each(reference_keys_B)
    nearest = [(piece @ references_BE[first].T).argmax(1) for piece in generated_BE.split(1024)]
    return (reference_keys_B[first][torch.cat(nearest)] == reference_keys_B).float()


def caption_ranks(image_BE: Tensor, text_BE: Tensor) -> Tensor:
    """Rank of each image's own caption among all captions, 0 for the nearest: rank_B."""
    similarity = image_BE @ text_BE.T
    return (similarity > similarity.diagonal()[:, None]).sum(1)
