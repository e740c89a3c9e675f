"""Scores on cases whose answer is known, and against the same numbers computed by hand."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from ipa.metrics.clip import ClipScorer
from ipa.metrics.prompt_scores import PromptScores, border_distance, caption_ranks, rgb_to_lab
from ipa.types import to_unit_range


@pytest.fixture
def scorer(clip_name: str) -> ClipScorer:
    return ClipScorer.from_pretrained(clip_name)


def pictures(seed: int, count: int = 6, size_px: int = tiny.REFERENCE_PX) -> Tensor:
    return to_unit_range(tiny.make_pictures(count, size_px, seed))


def plain(*colour: float) -> Tensor:
    """One picture of one colour, given in 0 … 255."""
    return to_unit_range(torch.tensor(colour)[None, :, None, None].expand(1, 3, 16, 16))


def framed(inside: Tensor, colour: float) -> Tensor:
    """The pictures with a frame one sixteenth of the edge wide."""
    out = torch.full_like(inside, colour)
    out[..., 1:-1, 1:-1] = inside[..., 1:-1, 1:-1]
    return out


def score(scorer: ClipScorer, generated: Tensor, prompts: Tensor) -> dict[str, float]:
    metric = PromptScores(scorer)
    metric.update(generated, prompts)
    return {name: float(value) for name, value in metric.compute().items()}


def test_pictures_against_themselves_are_perfect(scorer: ClipScorer) -> None:
    scores = score(scorer, pictures(1), pictures(1))

    assert scores["clip_i"] == pytest.approx(1, abs=1e-5)
    assert scores["retrieval_at_1"] == 1
    assert scores["border_lab"] == 0


def test_pictures_of_another_size_are_scored(scorer: ClipScorer) -> None:
    smooth = F.interpolate(pictures(1, size_px=3), (tiny.REFERENCE_PX,) * 2, mode="bicubic")
    large = F.interpolate(smooth, scale_factor=2, mode="bicubic")
    scores = score(scorer, large, smooth)

    assert scores["retrieval_at_1"] == 1
    assert scores["clip_i"] > 0.99


def test_pictures_that_took_the_neighbours_prompt_are_not_retrieved(scorer: ClipScorer) -> None:
    prompts = pictures(1)
    half = torch.cat([prompts[:3], prompts[[4, 5, 3]]])

    assert score(scorer, prompts.roll(1, 0), prompts)["retrieval_at_1"] == 0
    assert score(scorer, half, prompts)["retrieval_at_1"] == 0.5


def test_clip_i_is_the_mean_cosine_of_transformers_embeddings(scorer: ClipScorer) -> None:
    vision = tiny.make_vision(tiny.make_encoder())
    with torch.no_grad():
        pair = [vision(((p + 1) / 2 - scorer.mean) / scorer.std).image_embeds for p in (pictures(1), pictures(2))]
    cosine_BB = F.cosine_similarity(pair[0][:, None], pair[1][None], dim=-1)
    scores = score(scorer, pictures(1), pictures(2))

    assert scores["clip_i"] == pytest.approx(cosine_BB.diagonal().mean().item(), abs=1e-5)
    assert scores["retrieval_at_1"] == pytest.approx((cosine_BB.argmax(1) == torch.arange(6)).float().mean().item())


def test_two_updates_equal_one_of_all(scorer: ClipScorer) -> None:
    generated, prompts = pictures(1), pictures(2)
    metric = PromptScores(scorer)
    metric.update(generated[:2], prompts[:2])
    metric.update(generated[2:], prompts[2:])
    parts = {name: float(value) for name, value in metric.compute().items()}

    assert parts == pytest.approx(score(scorer, generated, prompts), abs=1e-5)
    metric.reset()
    metric.update(generated[:3], prompts[:3])
    again = {name: float(value) for name, value in metric.compute().items()}
    assert again == pytest.approx(score(scorer, generated[:3], prompts[:3]), abs=1e-5)


def test_states_of_two_processes_merge_to_those_of_one(scorer: ClipScorer) -> None:
    generated, prompts = pictures(1), pictures(2)
    first, second = PromptScores(scorer), PromptScores(scorer)
    first.update(generated[:2], prompts[:2])
    second.update(generated[2:], prompts[2:])
    first.merge_state(second)
    merged = {name: float(value) for name, value in first.compute().items()}

    assert merged == pytest.approx(score(scorer, generated, prompts), abs=1e-5)


CAPTIONS = ["cat", "a dog", "red hearts", "b", "", "the end"]


@pytest.mark.parametrize("parts", [[6], [2, 4]])
def test_clip_t_is_the_mean_cosine_of_pictures_and_their_captions(scorer: ClipScorer, parts: list[int]) -> None:
    generated, prompts, metric = pictures(1), pictures(2), PromptScores(scorer)
    for index in torch.arange(6).split(parts):
        metric.update(generated[index], prompts[index], [CAPTIONS[i] for i in index])
    scores = {name: float(value) for name, value in metric.compute().items()}
    with torch.no_grad():
        texts = scorer.clip.encode_text(scorer.tokenizer(CAPTIONS))
        images = scorer.clip.encode_image(((generated + 1) / 2 - scorer.mean) / scorer.std)
    cosine_B = F.cosine_similarity(images, texts)

    assert scores.pop("clip_t") == pytest.approx(cosine_B.mean().item(), abs=1e-5)
    assert cosine_B.std() > 0.01
    assert scores == pytest.approx(score(scorer, generated, prompts), abs=1e-5)
    metric.reset()
    metric.update(generated, prompts)
    assert "clip_t" not in metric.compute()


def test_clip_t_of_two_pictures_needs_each_its_own_caption(scorer: ClipScorer) -> None:
    right, wrong = PromptScores(scorer), PromptScores(scorer)
    right.update(pictures(1), pictures(1), CAPTIONS)
    wrong.update(pictures(1), pictures(1), CAPTIONS[1:] + CAPTIONS[:1])

    assert abs(right.compute()["clip_t"] - wrong.compute()["clip_t"]) > 1e-4


@pytest.mark.parametrize("captions", [CAPTIONS, None])
def test_scores_of_two_processes_are_gathered_to_those_of_one(scorer: ClipScorer, captions: list[str] | None) -> None:
    """The other process's states come in where torchmetrics gathers them."""
    others: list[Tensor] = []
    gather = {"dist_sync_fn": lambda mine, group: [mine, others.pop(0)], "distributed_available_fn": lambda: True}
    generated, prompts = pictures(1), pictures(2)
    first, second, whole = PromptScores(scorer, **gather), PromptScores(scorer), PromptScores(scorer)
    whole.update(generated, prompts, captions)
    first.update(generated[:2], prompts[:2], captions and captions[:2])
    second.update(generated[2:], prompts[2:], captions and captions[2:])
    others += [torch.cat(getattr(second, name) or [torch.zeros(0)]) for name in second._reductions]
    gathered = first.compute()

    assert not others and ("clip_t" in gathered) is (captions is not None)
    torch.testing.assert_close(gathered, whole.compute(), rtol=0, atol=1e-5)


def test_the_scorer_is_no_part_of_the_metric(scorer: ClipScorer) -> None:
    metric = PromptScores(scorer)

    assert isinstance(metric, Metric)
    assert not list(metric.parameters()) and not list(metric.children())
    assert metric.state_dict() == {}


def test_black_is_100_away_from_white() -> None:
    black, white, grey = plain(0, 0, 0), plain(255, 255, 255), plain(119, 119, 119)

    assert border_distance(black, white).item() == pytest.approx(100, abs=1e-3)
    assert border_distance(grey, black).item() == pytest.approx(50.03, abs=0.01)  # L of sRGB 119
    assert border_distance(torch.cat([black, white]), torch.cat([black, black])).tolist() == pytest.approx(
        [0, 100], abs=1e-3
    )


def test_borders_that_are_equal_have_no_distance_whatever_is_inside() -> None:
    one, other = framed(pictures(1, size_px=16), 0.3), framed(pictures(2, size_px=16), 0.3)

    assert border_distance(one, other).tolist() == [0] * 6
    assert border_distance(one, framed(pictures(1, size_px=16), 0.4)).min() > 1


def test_borders_of_another_size_are_compared() -> None:
    assert border_distance(plain(200, 30, 60), F.interpolate(plain(200, 30, 60), (40, 24))).item() == 0


def test_a_drawing_that_touches_the_border_here_and_there_does_not_count() -> None:
    touching = plain(255, 255, 255).clone()
    touching[..., :7] = -1  # less than half of the frame

    assert border_distance(touching, plain(255, 255, 255)).item() == 0


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((8, 8, 8), (2.19, 0.0, 0.0)),
    ],
)
def test_lab_of_well_known_colours(rgb: tuple[int, ...], lab: tuple[float, ...]) -> None:
    assert rgb_to_lab(torch.tensor([rgb]) / 255)[0].tolist() == pytest.approx(lab, abs=0.02)


def test_ranks_of_a_case_made_by_hand() -> None:
    text = torch.eye(3)
    image = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.4, 0.3], [0.8, 0.6, 0.1]])

    assert caption_ranks(image, text).tolist() == [0, 1, 2]
    assert caption_ranks(text, text).tolist() == [0, 0, 0]
