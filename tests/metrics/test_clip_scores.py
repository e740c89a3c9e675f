"""CLIP-I, CLIP-T and CLIPScore against their definitions, and retrieval on cases whose answer is known."""

import pytest
import tiny
import torch
from metric_samples import CAPTIONS, images
from torch import Tensor
from torchmetrics import Metric

from ipa.metrics.clip import ClipScorer
from ipa.metrics.clip_scores import ClipCosines, ClipScores, caption_ranks

FIRST = [own[0] for own in CAPTIONS]


def theirs(scorer: ClipScorer, generated: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit-length embeddings of images and texts by open_clip itself."""
    clip = tiny.make_clip()
    with torch.no_grad():
        images_BE = clip.encode_image(((generated + 1) / 2 - scorer.mean) / scorer.std, normalize=True)
        return images_BE, clip.encode_text(scorer.tokenizer(texts), normalize=True)


def test_clip_i_and_clip_t_are_the_cosines_of_the_embeddings(scorer: ClipScorer) -> None:
    generated, prompts, metric = images(1), images(2), ClipCosines(scorer)
    metric.update(generated, prompts, CAPTIONS)
    images_BE, texts_BE = theirs(scorer, generated, FIRST)
    prompts_BE, _ = theirs(scorer, prompts, FIRST)
    expected = {"clip_i": (images_BE * prompts_BE).sum(1), "clip_t": (images_BE * texts_BE).sum(1)}
    values = metric.per_item()

    assert expected["clip_t"].std() > 0.01
    for name, expected_B in expected.items():
        torch.testing.assert_close(values[name], expected_B, rtol=0, atol=1e-5)
        torch.testing.assert_close(metric.compute()[name], expected_B.mean(), rtol=0, atol=1e-5)


def test_clip_score_is_defined_per_pair_with_its_prefix(scorer: ClipScorer) -> None:
    generated, metric = images(1), ClipScores(scorer, prefix="a ")  # the tiny text encoder reads eight letters
    metric.update(generated, images(2), CAPTIONS)
    images_BE, texts_BE = theirs(scorer, generated, [f"a {text}" for text in FIRST])
    cosine_B = (images_BE * texts_BE).sum(1)
    values = metric.per_item()

    assert (cosine_B < 0).any() and (cosine_B > 0).any()
    torch.testing.assert_close(values["clip_t"], cosine_B, rtol=0, atol=1e-5)
    torch.testing.assert_close(values["clip_score"], 2.5 * cosine_B.clamp(min=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(metric.compute()["clip_score"], values["clip_score"].mean())
    assert ClipScores(scorer).prefix == "A photo depicts "
    assert list(metric.compute()) == list(values) == list(metric.higher)
    metric.reset()
    metric.update(generated, images(2))
    assert list(metric.compute()) == ["clip_i", "retrieval_at_1"]


def test_missing_captions_are_told(scorer: ClipScorer) -> None:
    with pytest.raises(ValueError, match="image 2 of the batch has no caption"):
        ClipCosines(scorer).update(images(1), images(1), [*CAPTIONS[:2], [], *CAPTIONS[3:]])


def test_pictures_that_took_the_neighbours_prompt_are_not_retrieved(scorer: ClipScorer) -> None:
    """A prompt with several pictures is one prompt."""
    prompts = images(1)
    repeated, right = prompts.repeat(2, 1, 1, 1), torch.cat([prompts, prompts[[0, 1, 2, 4, 5, 3]]])
    metric = ClipCosines(scorer)
    for index in torch.arange(12).split(5):
        metric.update(right[index], repeated[index])

    assert metric.per_item()["retrieval_at_1"].tolist() == [1] * 9 + [0] * 3
    assert metric.compute()["retrieval_at_1"] == 0.75


def test_the_scorer_is_no_part_of_the_metric(scorer: ClipScorer) -> None:
    metric = ClipCosines(scorer)

    assert isinstance(metric, Metric)
    assert not list(metric.parameters()) and not list(metric.children())
    assert metric.state_dict() == {}


def test_ranks_of_a_case_made_by_hand() -> None:
    text = torch.eye(3)
    image = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.4, 0.3], [0.8, 0.6, 0.1]])

    assert caption_ranks(image, text).tolist() == [0, 1, 2]
    assert caption_ranks(text, text).tolist() == [0, 0, 0]
