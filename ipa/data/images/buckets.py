"""Aspect-ratio buckets: sizes of about the same area that pictures are cropped to, one size per batch.

Podell et al. 2023 (SDXL), section 2.3: data are partitioned by aspect ratio, pixel counts stay as close to 1024² as
multiples of 64 px allow, and a batch has pictures of one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

from ipa.data.images.opening import Size
from ipa.errors import UserError

Group = tuple[list[int], int]
CutRest = Callable[[Sequence[int], list[int], int], list[Group]]

# Podell et al. 2023, appendix I: all (height, width) of SDXL's training. It has 704 × 1344, but not 1344 × 704.
# fmt: off
SDXL = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896),
    (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640),
    (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)
# fmt: on
SDXL_EDGE_PX = 1024
MULTIPLE_PX = 8  # a VAE of Stable Diffusion halves the size three times


def cut_mixed(buckets: Sequence[int], rest: list[int], group: int) -> list[Group]:
    """Neighbours by aspect ratio share the bucket of the one in their middle; ceil(n / group) groups in all."""
    pieces = [rest[start : start + group] for start in range(0, len(rest), group)]
    return [(filled(piece, group), buckets[piece[len(piece) // 2]]) for piece in pieces]


def cut_apart(buckets: Sequence[int], rest: list[int], group: int) -> list[Group]:
    """A group for each bucket that has a rest."""
    found = sorted({buckets[index] for index in rest})
    return [(filled([index for index in rest if buckets[index] == bucket], group), bucket) for bucket in found]


def filled(piece: list[int], group: int) -> list[int]:
    """The piece, repeated until the group is full."""
    return [piece[i % len(piece)] for i in range(group)]


@dataclass(frozen=True)
class Buckets:
    """``sizes`` are (width, height), by aspect ratio."""

    sizes: tuple[Size, ...]

    @classmethod
    def of(cls, values: Any, edge_px: int) -> Self:
        """``sdxl``: SDXL's list for this edge, in steps of 64 px from 512 px on, and smaller steps below.

        Or a list of [width, height]. Raises UserError.
        """
        step_px = min(64, max(MULTIPLE_PX, edge_px // 64 * MULTIPLE_PX))
        if values == "sdxl":
            return cls(ordered(scaled((width, height), edge_px, step_px) for height, width in SDXL))
        if not isinstance(values, Sequence) or isinstance(values, str) or not values or not all(map(is_size, values)):
            raise UserError(
                f"data.buckets={values}: give sdxl, or a list of [width, height] in multiples of {MULTIPLE_PX} px, "
                "as in [[512,512],[640,384],[384,640]]"
            )
        return cls(ordered((width, height) for width, height in values))

    def nearest(self, size: Size | None) -> Size:
        """The bucket with the nearest aspect ratio (in logarithms); an unknown size counts as square."""
        return self.sizes[self.index(size)]

    def index(self, size: Size | None) -> int:
        aspect = math.log(size[0] / size[1]) if size else 0.0
        return min(range(len(self.sizes)), key=lambda i: abs(aspect - math.log(self.sizes[i][0] / self.sizes[i][1])))

    @staticmethod
    def cut_rest(buckets: Sequence[int], rest: list[int], group: int) -> list[Group]:
        return cut_mixed(buckets, rest, group)

    def arrange(self, sizes: Sequence[Size | None], group: int) -> list[tuple[list[int], Size]]:
        """Records of these sizes in groups that share a bucket, see ``arrange``."""
        groups = arrange([self.index(size) for size in sizes], group, self.cut_rest)
        return [(indices, self.sizes[bucket]) for indices, bucket in groups]


class FixedBuckets(Buckets):
    """For pictures that are already cropped: none is moved to another bucket, which gives some more groups."""

    @staticmethod
    def cut_rest(buckets: Sequence[int], rest: list[int], group: int) -> list[Group]:
        return cut_apart(buckets, rest, group)


def ordered(sizes: Any) -> tuple[Size, ...]:
    """Each once, from tall to wide."""
    return tuple(sorted(set(sizes), key=lambda size: (size[0] / size[1], size)))


def is_size(value: Any) -> bool:
    if not isinstance(value, Sequence) or len(value) != 2:
        return False
    return all(isinstance(side, int) and side > 0 and side % MULTIPLE_PX == 0 for side in value)


def scaled(size: Size, edge_px: int, step_px: int) -> Size:
    """SDXL's ``size`` for another edge: of the four nearest sizes the one with the best aspect ratio and area."""
    exact = [side * edge_px / SDXL_EDGE_PX for side in size]
    sides = [(max(1, math.floor(side / step_px)), math.ceil(side / step_px)) for side in exact]

    def distance(found: Size) -> float:
        width, height = (math.log(new / old) for new, old in zip(found, exact, strict=True))
        return abs(width - height) + abs(width + height)

    return min(((w * step_px, h * step_px) for w, h in product(*sides)), key=distance)


def arrange(buckets: Sequence[int], group: int, cut_rest: CutRest = cut_mixed) -> list[Group]:
    """Records, given by their ``buckets`` → groups of ``group`` indices, with the bucket of each.

    Every bucket gives whole groups in the given order; ``cut_rest`` groups the others. The groups are sorted by their
    first records, not by bucket. Every record occurs at least once.
    """
    members: dict[int, list[int]] = {}
    for index, bucket in enumerate(buckets):
        members.setdefault(bucket, []).append(index)
    groups: list[Group] = []
    rest: list[int] = []
    for bucket, indices in sorted(members.items()):
        end = len(indices) // group * group
        groups += [(indices[start : start + group], bucket) for start in range(0, end, group)]
        rest += indices[end:]
    groups += cut_rest(buckets, rest, group)
    return sorted(groups, key=lambda found: min(found[0]))
