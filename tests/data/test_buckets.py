import math
import random
from collections import Counter
from itertools import pairwise

import pytest
from omegaconf import OmegaConf

from ipa.data.images.buckets import SDXL, Buckets, FixedBuckets, arrange, cut_apart

GROUP = 4


def aspect(size: tuple[int, int]) -> float:
    return math.log(size[0] / size[1])


def test_sdxls_list_is_that_of_the_paper() -> None:
    """Podell et al. 2023, appendix I: its columns of heights, and of aspect ratios (height : width) as printed."""
    ratios = """0.25 0.26 0.27 0.28 0.32 0.33 0.35 0.4 0.42 0.48 0.5 0.52 0.57 0.6 0.68 0.72 0.78 0.82 0.88 0.94
        1.0 1.07 1.13 1.21 1.29 1.38 1.46 1.67 1.75 2.0 2.09 2.4 2.5 2.89 3.0 3.11 3.62 3.75 3.88 4.0"""

    assert [height / width for height, width in SDXL] == [
        pytest.approx(float(ratio), abs=0.01) for ratio in ratios.split()
    ]
    assert all(side % 64 == 0 for size in SDXL for side in size)
    assert all(0.9 * 1024**2 < height * width <= 1024**2 for height, width in SDXL)
    assert len(set(SDXL)) == 40
    assert set(Buckets.of("sdxl", 1024).sizes) == {(width, height) for height, width in SDXL}


@pytest.mark.parametrize("edge", [768, 512, 256, 64])
def test_sdxls_buckets_at_other_edges(edge: int) -> None:
    sizes, step = Buckets.of("sdxl", edge).sizes, 64 if edge >= 512 else 8

    assert (edge, edge) in sizes and len(set(sizes)) == len(sizes) > 10
    assert all(side % step == 0 for size in sizes for side in size)
    assert all(0.85 * edge**2 < width * height < 1.15 * edge**2 for width, height in sizes)
    assert list(map(aspect, sizes)) == sorted(map(aspect, sizes))


def test_a_list_of_ones_own() -> None:
    values = OmegaConf.create([[512, 512], [640, 384], [384, 640], [512, 512]])  # as YAML brings it
    buckets = Buckets.of(values, 512)

    assert buckets.sizes == ((384, 640), (512, 512), (640, 384))
    assert buckets == Buckets.of([[384, 640], [640, 384], [512, 512]], 512)
    assert repr(buckets) == "Buckets(sizes=((384, 640), (512, 512), (640, 384)))"  # part of fingerprints


@pytest.mark.parametrize(
    "values", ["sd15", [], [512, 512], [[512]], [[500, 512]], [["512", 512]], [[0, 8]], 7, {"a": 1}]
)
def test_bad_bucket_lists_are_refused(values: object) -> None:
    with pytest.raises(ValueError, match=r"data\.buckets=.*give sdxl, or a list of \[width, height\]"):
        Buckets.of(values, 512)


def test_the_nearest_bucket_has_the_nearest_aspect_ratio() -> None:
    buckets = Buckets.of([[256, 512], [384, 384], [512, 256]], 384)

    for size in buckets.sizes:
        assert buckets.nearest(size) == buckets.nearest((size[0] * 7, size[1] * 7)) == size
    assert [buckets.nearest(size) for size in ((1, 1000), (1000, 1), (100, 140), (100, 142))] == [
        (256, 512),
        (512, 256),
        (384, 384),  # the border is at the root of 2
        (256, 512),
    ]
    assert buckets.nearest(None) == (384, 384)


def draw_buckets(seed: int, number: int) -> list[int]:
    """Most in the middle, as with photographs."""
    draw = random.Random(seed)
    return [min(6, int(draw.expovariate(0.7))) for _ in range(number)]


@pytest.mark.parametrize("number", [0, 1, 3, 4, 5, 64, 101])
@pytest.mark.parametrize("seed", range(3))
def test_every_record_comes_and_groups_share_a_bucket(seed: int, number: int) -> None:
    buckets = draw_buckets(seed, number)
    groups = arrange(buckets, GROUP)
    counts = Counter(index for indices, _ in groups for index in indices)

    assert groups == arrange(buckets, GROUP)
    assert len(groups) == math.ceil(number / GROUP) and all(len(indices) == GROUP for indices, _ in groups)
    assert sorted(counts) == list(range(number))
    assert sum(counts.values()) - number == -number % GROUP, "repeated only to fill the last group"
    for indices, bucket in groups:
        assert bucket in {buckets[index] for index in indices}
    moved = sum(buckets[index] != bucket for indices, bucket in groups for index in set(indices))
    assert moved <= (GROUP - 1) * len(set(buckets)), "only what is left over leaves its bucket"


def test_whole_groups_keep_their_order_and_what_is_left_over_is_sorted_and_takes_the_bucket_of_its_middle() -> None:
    assert arrange([0, 1, 0, 1, 1, 0, 1, 0], 2) == [([0, 2], 0), ([1, 3], 1), ([4, 6], 1), ([5, 7], 0)]
    assert arrange([5, 0, 9, 1, 5], 3) == [([1, 3, 0], 1), ([4, 2, 4], 9)]
    assert arrange([3], 3) == [([0, 0, 0], 3)]
    assert arrange([3, 4], 5) == [([0, 1, 0, 1, 0], 4)]


def test_groups_do_not_come_by_bucket() -> None:
    """In a long window the buckets alternate as the records do."""
    order = [bucket for _, bucket in arrange(draw_buckets(0, 2000), GROUP)]
    changes = sum(a != b for a, b in pairwise(order))

    assert changes > len(order) / 3
    assert order != sorted(order)


@pytest.mark.parametrize("number", [1, 5, 64, 101])
def test_what_is_already_cut_never_leaves_its_bucket(number: int) -> None:
    buckets = draw_buckets(0, number)
    groups = arrange(buckets, GROUP, cut_apart)

    assert all(buckets[index] == bucket for indices, bucket in groups for index in indices)
    assert {index for indices, _ in groups for index in indices} == set(range(number))
    assert len(groups) <= math.ceil(number / GROUP) + len(set(buckets))


def test_sizes_are_arranged_into_their_buckets() -> None:
    sizes = [(100, 50), (50, 50), None, (100, 51), (60, 50)]
    loose, fixed = (kind(((8, 16), (16, 16), (16, 8))) for kind in (Buckets, FixedBuckets))

    assert loose.arrange(sizes, 2) == [([0, 3], (16, 8)), ([1, 2], (16, 16)), ([4, 4], (16, 16))]
    assert fixed.arrange(sizes[:4], 3) == [([0, 3, 0], (16, 8)), ([1, 2, 1], (16, 16))]
