"""Samples that cannot be used: skipped and counted by reason, never repaired silently."""

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
UNSAFE_MEMBER = "unsafe member"  # a link, a device, a path outside the folder, or a reserved name
TOO_LARGE = "too large a member"


class Rejected(Exception):
    """A sample, or the rest of a shard, cannot be used: ``reason`` is counted, ``detail`` is for the log."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def copy(self) -> Rejected:
        """Without a traceback, whose frames would keep the sample in memory."""
        return Rejected(self.reason, self.detail)


class NoGoodSamples(UserError):
    """A whole pass over the shards gave no usable sample."""


def no_good_samples(rejects: Mapping[str, int], shards: int) -> NoGoodSamples:
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(rejects.items())) or "they are empty"
    return NoGoodSamples(
        f"no usable sample in a whole pass over {shards} shards ({counts}). Expected img2dataset's layout: a picture "
        "and its caption under one key per sample. Check data.captions and data.filters, and list a shard: `tar tf`."
    )
