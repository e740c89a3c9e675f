"""Samples that cannot be used: skipped, counted by reason, and never repaired in silence."""

from __future__ import annotations

from collections.abc import Mapping

from ipa.errors import UserError

BROKEN_TAR = "broken tar"
NO_PICTURE = "no picture"
BROKEN_PICTURE = "broken picture"
TOO_MANY_PIXELS = "too many pixels"
NO_CAPTION = "no caption"
EMPTY_CAPTION = "empty caption"
NOT_UTF8 = "caption is not UTF-8"
NO_REFERENCE = "no reference"
BROKEN_METADATA = "broken metadata"
DUPLICATE_KEY = "duplicate key"
UNSAFE_MEMBER = "unsafe member"  # a link, a device, or a name that would leave the folder that it is unpacked in
TOO_LARGE = "too large a member"


def filtered(name: str) -> str:
    """The reason of a sample that this filter leaves out."""
    return f"filter: {name}"


def without_number(name: str) -> str:
    """The reason of a sample that does not tell what this filter asks."""
    return f"filter: {name} is missing"


class Rejected(Exception):
    """A sample, or the rest of a shard, cannot be used: ``reason`` is what is counted, ``detail`` is for the log."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class NoGoodSamples(UserError):
    """A whole pass over the shards gave nothing to train on."""


def no_good_samples(rejects: Mapping[str, int], shards: int) -> NoGoodSamples:
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(rejects.items())) or "they are empty"
    return NoGoodSamples(
        f"no usable sample in a whole pass over {shards} shards ({counts}). Expected img2dataset's layout: per sample "
        "a picture and its caption under one key. Check data.captions and data.filters, and look into a shard with "
        "`tar tf`."
    )
