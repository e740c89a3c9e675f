"""What is read of a sample without decoding it."""

from __future__ import annotations

import pytest

from ipa.data.images.opening import picture_size
from ipa.data.rejects import Rejected
from ipa.data.shards.fields import Captions, Fields


def test_too_large_a_picture_is_rejected_by_its_header() -> None:
    assert picture_size(b"P5 9500 10000 255\n") == (9500, 10000)  # PIL only warns of it: data.max_pixels decides
    with pytest.raises(Rejected, match="too many pixels"):
        picture_size(b"P5 60000 60000 255\n")


def test_the_picture_is_none_of_the_references() -> None:
    members = {"jpg": b"reference", "png": b"picture", "ref.jpg": b"another"}
    assert Fields(members).picture == b"reference"
    assert Fields(members, ["jpg", "ref.jpg"]).picture == b"picture"
    with pytest.raises(Rejected, match="no picture"):
        _ = Fields(members, ["jpg", "png"]).picture


def test_the_option_names_the_picture_and_the_reason_says_so() -> None:
    members = {"1.jpg": b"one", "2.jpg": b"two", "txt": b"x"}
    assert Fields(members, images=["2.jpg"]).picture == b"two"
    for fields, words in (
        (Fields(members), r"data\.image=1\.jpg"),
        (Fields({"txt": b"x"}), r"only txt.*tar --sort=name"),
    ):
        with pytest.raises(Rejected, match=words):
            _ = fields.picture


def test_a_byte_order_mark_is_no_text() -> None:
    fields = Fields({"txt": "\ufeffred".encode(), "json": '\ufeff{"a": 1}'.encode()})
    assert Captions().read(fields) == (("red", 1.0),) and fields.metadata == {"a": 1}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"null", b'{"a": "caf\xe9"}', b"[" * 100_000, b"", b"9" * 5000])
def test_broken_metadata(content: bytes) -> None:
    with pytest.raises(Rejected, match="broken metadata"):
        _ = Fields({"json": content}).metadata
