"""Numbers that a sample must have."""

import json
from typing import Any

import pytest
from omegaconf import OmegaConf
from tars import png

from ipa.data.rejects import Rejected
from ipa.data.shards.fields import Fields
from ipa.data.shards.filters import read_filters


def reason(
    filters: dict[str, Any], metadata: Any = None, picture: bytes = b"", caption: str = "a red thing"
) -> str | None:
    """Why the sample is left out; None if it passes."""
    members = {"png": picture or png((30, 20)), **({} if metadata is None else {"json": json.dumps(metadata).encode()})}
    try:
        for each in read_filters(filters):
            each.check(Fields(members), caption)
    except Rejected as reject:
        return reject.reason
    return None


@pytest.mark.parametrize(
    ("limits", "passes"),
    [
        ({"min": 0.5}, True),
        ({"min": 0.51}, False),
        ({"max": 0.5}, True),
        ({"max": 0.49}, False),
        ({"min": 0, "max": 1}, True),
        ({"min": 0.5, "max": 0.5}, True),
        ({"min": 0.6, "max": 1}, False),
        ({"min": None, "max": 0.4}, False),
    ],
)
@pytest.mark.parametrize("value", [0.5, "0.5", " 5e-1 "])
def test_limits_belong_to_what_passes(limits: dict[str, Any], passes: bool, value: Any) -> None:
    found = reason({"watermark": {"key": "json.pwatermark", **limits}}, {"pwatermark": value})
    assert found == (None if passes else "filter: watermark")


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"p": None}, {"p": ""}, {"p": "UNLIKELY"}, {"p": float("nan")}, {"p": [1]}, {"p": 10**400}],
)
def test_missing_numbers(metadata: Any) -> None:
    assert reason({"unsafe": {"key": "json.p", "max": 1}}, metadata) == "filter: unsafe is missing"
    assert reason({"unsafe": {"key": "json.p", "max": 1, "missing": "reject"}}, metadata) == "filter: unsafe is missing"
    assert reason({"unsafe": {"key": "json.p", "max": 1, "missing": "keep"}}, metadata) is None


def test_the_first_key_with_a_number_counts() -> None:
    filters = {"watermark": {"key": ["json.pwatermark", "json.watermark_score"], "max": 0.5}}
    assert reason(filters, {"watermark_score": 0.2}) is None
    assert reason(filters, {"watermark_score": 0.7}) == "filter: watermark"
    assert reason(filters, {"pwatermark": 0.7, "watermark_score": 0.2}) == "filter: watermark"
    assert reason(filters, {"pwatermark": None, "watermark_score": 0.2}) is None
    assert reason(filters, {"similarity": 0.2}) == "filter: watermark is missing"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("short_side_px", 20),
        ("aspect_ratio", 1.5),  # of the long side
        ("caption_characters", 11),
        ("caption_words", 3),
    ],
)
def test_quantities(key: str, value: float) -> None:
    assert reason({"it": {"key": key, "min": value, "max": value}}) is None
    assert reason({"it": {"key": key, "min": value + 0.01}}) == "filter: it"
    assert reason({"it": {"key": key, "max": value - 0.01}}) == "filter: it"


def test_sizes_are_those_of_the_picture_whatever_the_metadata_say() -> None:
    assert reason({"it": {"key": "aspect_ratio", "min": 2, "max": 2}}, picture=png((10, 20))) is None
    assert reason({"it": {"key": "short_side_px", "min": 200}}, picture=png((300, 200))[:60]) is None
    assert reason({"it": {"key": "short_side_px", "min": 21}}, {"width": 3000, "height": 2000}) == "filter: it"
    assert reason({"it": {"key": "json.original_width", "min": 21}}, {"original_width": 3000}) is None
    filters = {"long": {"key": "aspect_ratio", "max": 1.2}, "small": {"key": "short_side_px", "min": 512}}
    assert reason(filters) == "filter: long"  # the first one that rejects is counted
    assert reason(dict(reversed(filters.items()))) == "filter: small"


def test_broken_things_keep_their_own_reasons() -> None:
    assert reason({"it": {"key": "short_side_px", "min": 1}}, picture=b"<html>") == "broken picture"
    assert reason({"it": {"key": "json.p", "min": 1, "missing": "keep"}}, ["no", "mapping"]) == "broken metadata"
    assert reason({"it": {"key": "caption_words", "min": 1}}, ["no", "mapping"], b"<html>") is None


def test_filters_from_hydra_are_plain_values() -> None:
    assert read_filters(None) == read_filters({}) == read_filters({"small": None}) == ()
    values = {"a": {"key": ["json.p", "json.q"], "min": 1, "missing": "keep"}, "b": {"key": "aspect_ratio", "max": 2}}
    filters = read_filters(OmegaConf.create(values))
    assert filters == read_filters(values) and all(type(key) is str for each in filters for key in each.keys)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"key": "json.p", "max": 1, "mas": 2}, "unknown option mas; there are key, min, max, missing"),
        ({"key": "json.p"}, "give min, max or both"),
        ({"key": "json.p", "min": 2, "max": 1}, "at least min=2 and at most max=1"),
        ({"key": "json.p", "min": "high"}, "min=high is no number"),
        ({"key": "json.p", "max": True}, "max=True is no number"),
        ({"key": "json.p", "max": float("nan")}, "max=nan is no number"),
        ({"key": "pwatermark", "max": 1}, "key=pwatermark: give short_side_px, .*json.NAME"),
        ({"key": ["json.p", "json."], "max": 1}, r"key=json\.: give"),
        ({"key": [], "max": 1}, "key=None: give"),
        ({"key": "json.p", "max": 1, "missing": "ignore"}, "missing=ignore: give reject or keep"),
        (0.5, "0.5 is no filter; give {key, min, max, missing}, or null"),
    ],
)
def test_bad_filters_are_refused_with_the_possible_values(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.filters\.watermark: .*{message}"):
        read_filters({"watermark": values})
