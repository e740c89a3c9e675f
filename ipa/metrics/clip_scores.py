"""CLIP similarity of generated images to their image prompts and to the prompts' captions.

* clip_i: cosine of the embeddings of image and prompt, in [-1, 1] (Ye et al. 2023, section 4.1.3).
* clip_t: cosine of the embeddings of image and prompt's caption, whether or not generation used the caption.
* clip_score: CLIPScore, 2.5 · max(cosine, 0) of image and caption (Hessel et al. 2021, equation 1).
* retrieval_at_1: 1 where an image's nearest prompt, among all prompts seen, is its own; chance is 1 / prompts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ipa.errors import UserError
from ipa.metrics.clip import ClipScorer
from ipa.metrics.image_metric import Images, ItemMetric, first_of_each, image_keys

CAPTIONS = ("first", "mean", "all")
# states that retrieval compares over all images
COMPARED = ("generated_BE", "references_BE", "reference_keys_B")


class ClipCosines(ItemMetric):
    """clip_i and retrieval_at_1, and clip_t where there are captions.

    If a prompt has several ``captions``, the ``first`` counts, or the ``mean`` of their values, or ``all`` as one: the
    normalised mean of their embeddings, as in CLIP's prompt ensembles (Radford et al. 2021, section 3.1.4). ``prefix``
    is prepended to each.
    """

    about_text: ClassVar[tuple[str, ...]] = ("clip_t",)

    network: ClipScorer

    def __init__(self, scorer: ClipScorer, captions: str = "first", prefix: str = "", **kwargs: Any) -> None:
        if captions not in CAPTIONS:
            raise UserError(f"captions={captions}: one of {', '.join(CAPTIONS)}")
        names = ("clip_i", *self.about_text, "retrieval_at_1")
        super().__init__(["clip_i", *self.about_text, *COMPARED], dict.fromkeys(names, True), network=scorer, **kwargs)
        self.captions, self.prefix = captions, prefix

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
        """State → value_B of each image and its own captions."""
        if not all(captions):
            raise UserError(f"image {[len(own) for own in captions].index(0)} of the batch has no caption")
        chosen = [own[:1] if self.captions == "first" else own for own in captions]
        texts_NE = self.network.embed_texts([self.prefix + text for own in chosen for text in own])
        owners_N = torch.repeat_interleave(torch.tensor([len(own) for own in chosen])).to(texts_NE.device)
        if self.captions == "all":
            texts_NE = F.normalize(mean_by_owner(texts_NE, owners_N, len(chosen)), dim=-1)
            owners_N = torch.arange(len(chosen), device=texts_NE.device)
        cosines_N = (generated_BE[owners_N] * texts_NE).sum(1)
        scores = self.score_texts(cosines_N).items()
        return {name: mean_by_owner(values_N, owners_N, len(chosen)) for name, values_N in scores}

    def score_texts(self, cosines_N: Tensor) -> dict[str, Tensor]:
        """State → value_N of each pair of image and caption."""
        return {"clip_t": cosines_N}

    def values(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        values = {name: rows[name] for name in self.higher if name in rows}
        return values | {"retrieval_at_1": retrieve(*(rows[name] for name in COMPARED))}


class ClipScores(ClipCosines):
    """``ClipCosines`` and clip_score, with the prefix from the definition of CLIPScore."""

    about_text: ClassVar[tuple[str, ...]] = ("clip_t", "clip_score")

    def __init__(
        self, scorer: ClipScorer, captions: str = "first", prefix: str = "A photo depicts ", **kwargs: Any
    ) -> None:
        super().__init__(scorer, captions, prefix, **kwargs)

    def score_texts(self, cosines_N: Tensor) -> dict[str, Tensor]:
        return {"clip_t": cosines_N, "clip_score": 2.5 * cosines_N.clamp(min=0)}


def mean_by_owner(values_N: Tensor, owners_N: Tensor, count: int) -> Tensor:
    """The mean of each owner's rows; every owner has at least one."""
    sums = values_N.new_zeros((count, *values_N.shape[1:])).index_add_(0, owners_N, values_N)
    counts = torch.bincount(owners_N, minlength=count).to(values_N.dtype)
    return sums / counts.view(-1, *[1] * (values_N.ndim - 1))


def retrieve(generated_BE: Tensor, references_BE: Tensor, reference_keys_B: Tensor) -> Tensor:
    """1 where the nearest reference is the image's own, else 0: hit_B. Equal keys mean the same reference."""
    first = first_of_each(reference_keys_B)
    nearest = [(piece @ references_BE[first].T).argmax(1) for piece in generated_BE.split(1024)]
    return (reference_keys_B[first][torch.cat(nearest)] == reference_keys_B).float()


def caption_ranks(image_BE: Tensor, text_BE: Tensor) -> Tensor:
    """Rank of each image's own caption among all captions, 0 for the nearest: rank_B."""
    similarity = image_BE @ text_BE.T
    return (similarity > similarity.diagonal()[:, None]).sum(1)
