"""What all metrics promise: batches change nothing; images are fitted within their range, and known by their pixels."""

from collections.abc import Callable

import pytest
import torch
from metric_samples import CAPTIONS, images, told
from torch import Tensor

from ipa.metrics.aesthetic import AestheticScore
from ipa.metrics.border import BorderColour, border_distance
from ipa.metrics.clip import ClipScorer
from ipa.metrics.clip_scores import ClipScores
from ipa.metrics.distributions import FrechetDistance, KernelDistance
from ipa.metrics.edges import EdgeOverlap, edge_overlap, edges_at_one_size
from ipa.metrics.image_metric import (
    ImageDistance,
    ImageMetric,
    ImageSimilarity,
    ItemMetric,
    fit_square,
    image_keys,
)

MAKERS: dict[str, Callable[[ClipScorer], ImageMetric]] = {
    "clip": lambda scorer: ClipScores(scorer),
    "border": lambda scorer: BorderColour(),
    "edges": lambda scorer: EdgeOverlap(),
    "similarity": lambda scorer: ImageSimilarity(scorer, "likeness"),
    "distance": lambda scorer: ImageDistance(scorer, "distance"),
    "fid": lambda scorer: FrechetDistance(scorer),
    "kid": lambda scorer: KernelDistance(scorer, subsets=5, subset_size=4),
}
NUMBERS = torch.arange(6)


def give(metric: ImageMetric, *batches: Tensor) -> ImageMetric:
    """Update with the pairs of these numbers, a batch at a time."""
    for index_B in batches:
        captions = [CAPTIONS[i] for i in index_B]
        metric.update(images(1)[index_B], images(2)[index_B], captions)
    return metric


@pytest.mark.parametrize("name", MAKERS)
def test_batches_resets_and_merges_do_not_matter(scorer: ClipScorer, name: str) -> None:
    make = MAKERS[name]
    expected = give(make(scorer), NUMBERS)
    split = give(make(scorer), *NUMBERS.split(4))
    reset, merged = give(make(scorer), NUMBERS[:4]), give(make(scorer), NUMBERS[2:])
    reset.reset()
    merged.merge_state(give(make(scorer), NUMBERS[:2]))  # torchmetrics puts it first

    for metric in (split, merged, give(reset, NUMBERS)):
        torch.testing.assert_close(metric.compute(), expected.compute(), rtol=0, atol=1e-5)
        if isinstance(metric, ItemMetric):
            torch.testing.assert_close(metric.per_item(), expected.per_item(), rtol=0, atol=1e-5)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    return edge_overlap(edges_at_one_size(one), edges_at_one_size(other))


@pytest.mark.parametrize(("name", "distance"), [("border", border_distance), ("edges", overlap)])
def test_the_metric_has_each_pair_and_the_mean(name: str, distance: Callable[..., Tensor]) -> None:
    """Also of images in a list."""
    metric, expected = MAKERS[name](None), distance(images(1), images(2))  # type: ignore[arg-type]
    metric.update(list(images(1)), list(images(2)))
    ((key, value),) = metric.compute().items()

    torch.testing.assert_close(metric.per_item()[key], expected)
    torch.testing.assert_close(value, expected.mean())
    assert metric.higher == {key: name == "edges"}


def test_a_picture_is_like_itself(scorer: ClipScorer) -> None:
    likeness, distance = ImageSimilarity(scorer, "likeness"), ImageDistance(scorer, "distance")
    for metric in (likeness, distance):
        metric.update(images(1), images(1))

    torch.testing.assert_close(likeness.per_item()["likeness"], torch.ones(6))
    assert told(distance)["distance"] == pytest.approx(0, abs=1e-6)
    assert (likeness.higher, distance.higher) == ({"likeness": True}, {"distance": False})


def test_unequal_numbers_are_told(scorer: ClipScorer) -> None:
    metric = ClipScores(scorer)

    with pytest.raises(ValueError, match=r"equally many.*'generated': 6, 'references': 5"):
        metric.update(images(1), images(2)[:5])
    metric.update(images(1), images(2), CAPTIONS)
    metric.update(images(1), images(2))
    with pytest.raises(ValueError, match=r"with every update or with none: .*'clip_t': 6"):
        metric.compute()
    with pytest.raises(ValueError, match="BorderColour has no images"), pytest.warns(match="before the"):
        BorderColour().compute()


def test_the_network_moves_and_the_rows_stay(clip_name: str) -> None:
    scorer = ClipScorer.from_pretrained(clip_name)
    metric = give(ClipScores(scorer), NUMBERS)

    assert metric.to("meta") is metric
    assert scorer.mean.device.type == "meta"
    assert metric.compute()["clip_i"].device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [*MAKERS, "aesthetic"])
def test_a_gpu_gives_the_same_values(clip_name: str, name: str) -> None:
    """Wherever the images are: the metric moves them to its network."""
    head = torch.nn.Sequential(torch.nn.Linear(12, 1))
    makers = MAKERS | {"aesthetic": lambda scorer: AestheticScore(scorer, head)}
    expected = give(makers[name](ClipScorer.from_pretrained(clip_name)), NUMBERS).compute()
    metric = makers[name](ClipScorer.from_pretrained(clip_name)).to("cuda")
    give(metric, NUMBERS[:4])
    metric.update(images(1)[4:].cuda(), images(2)[4:].cuda(), CAPTIONS[4:])

    torch.testing.assert_close(metric.compute(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(20, 32), (32, 20), (8, 8), (64, 64)])
def test_fitted_pictures_stay_in_range(size: tuple[int, int]) -> None:
    black_and_white = torch.rand(2, 3, *size).round() * 2 - 1
    fitted = fit_square(black_and_white, 16)

    assert fitted.shape == (2, 3, 16, 16)
    assert -1 <= fitted.min() < -0.5 and 0.5 < fitted.max() <= 1


def test_the_centre_is_cut_out_of_the_fitted_square() -> None:
    large = images(0, size_px=30)

    torch.testing.assert_close(fit_square(large, 20, 16), fit_square(large, 20)[..., 2:18, 2:18])
    assert fit_square(large, 30, 16).equal(large[..., 7:23, 7:23])


def test_keys_are_equal_for_equal_pictures_only() -> None:
    given = images(0)
    changed = given.clone()
    changed[:, 0, 3, 5] = -changed[:, 0, 3, 5].sign()
    reshaped = given.reshape(6, 3, 12, 48)
    keys = [image_keys(some) for some in (given, changed, reshaped, list(given.roll(1, 0)))]

    assert len(torch.cat(keys[:3]).unique()) == 18
    assert keys[3].equal(keys[0].roll(1))
    assert image_keys(given + 1e-4).equal(keys[0])  # as after a detour over 256 levels
