"""What is read of a sample without decoding it: its picture, its captions and their chances."""

import json
from collections import Counter
from typing import Any

import pytest
from omegaconf import OmegaConf

from ipa.data.addresses import Address
from ipa.data.images.opening import picture_size
from ipa.data.rejects import Rejected
from ipa.data.shards.fields import Captions, Fields

MEMBERS = {
    "txt": b" from the web\n",
    "blip": b"from blip",
    "json": json.dumps(
        {"alt": "alternative", "many": ["one", " ", "two", None, 3], "none": None, "empty": [""], "half": ["\udc00 a"]}
    ).encode(),
    "bad": b"caf\xe9",
    "blank": b" \n",
}


def read(captions: Any, members: dict[str, bytes] = MEMBERS) -> list[tuple[str, float]]:
    return [(text, pytest.approx(chance)) for text, chance in Captions.of(captions).read(Fields(members))]


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ("txt", [("from the web", 1)]),
        ("json.alt", [("alternative", 1)]),
        (["json.none", "blank", "blip", "txt"], [("from blip", 1)]),
        (["json.many", "txt"], [("one", 1)]),
        ({"txt": 3, "blip": 1}, [("from the web", 0.75), ("from blip", 0.25)]),
        ({"txt": 2, "json.many": 2}, [("from the web", 0.5), ("one", 0.25), ("two", 0.25)]),
        ({"txt": 1, "bad": 5, "json.none": 2, "blip": 3}, [("from the web", 0.25), ("from blip", 0.75)]),
        ({"keys": ["txt", "blip"], "choice": "random"}, [("from the web", 0.5), ("from blip", 0.5)]),
        ({"keys": ["txt", "json.many"], "choice": "random"}, [("from the web", 0.5), ("one", 0.25), ("two", 0.25)]),
        ({"keys": ["bad", "txt"], "choice": "first"}, [("from the web", 1)]),
        ({"keys": {"txt": 1, "blip": 1}, "choice": "weight"}, [("from the web", 0.5), ("from blip", 0.5)]),
        ({"keys": "blip"}, [("from blip", 1)]),
        ("BLIP", [("from blip", 1)]),  # as members' extensions, it is read in lower case
    ],
)
def test_captions_and_chances(captions: Any, expected: list[tuple[str, float]]) -> None:
    assert read(captions) == expected
    assert read(OmegaConf.create({"captions": captions}).captions) == expected


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        ("cap", "no caption"),
        ("json.title", "no caption"),
        ("json.none", "no caption"),
        ("json.empty", "empty caption"),
        ("blank", "empty caption"),
        ("bad", "caption is not UTF-8"),
        (["blank", "bad", "cap"], "empty caption"),
        ({"bad": 1, "blank": 100}, "caption is not UTF-8"),
        ("json.half", "caption is not UTF-8"),
    ],
)
def test_without_a_usable_one_the_first_keys_reason_counts(captions: Any, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        read(captions)
    assert caught.value.reason == reason


def test_broken_metadata_are_a_reason_only_if_no_other_key_helps() -> None:
    members = {"txt": b"a thing", "json": b"{"}
    assert read(["json.alt", "txt"], members) == [("a thing", 1)]
    with pytest.raises(Rejected, match="broken metadata"):
        read(["json.alt", "blip"], members)


@pytest.mark.parametrize(
    "captions",
    [
        *(None, 3, "", [], {}, [""], "json", "json.", ".txt", ["txt", "TXT"], [["txt"]]),
        *({"txt": 0}, {"txt": -1}, {"txt": "much"}, {"txt": None}, {"txt": True}, {"txt": float("inf")}),
        *({"keys": ["txt"], "choice": "best"}, {"keys": ["txt"], "choice": "weight"}, {"keys": None}),
        *({"keys": {"txt": 1}, "choice": "random"}, {"keys": "txt", "weight": 2}),
    ],
)
def test_bad_captions_are_refused_with_the_option_and_the_possible_values(captions: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^data\.known\.mine\.captions.*json\.NAME.*choice: first \| random \| weight"
    ):
        Captions.of(captions, "data.known.mine.captions")


class At(Address):
    """An address whose draw is given by its index."""

    def uniform(self, draw: str) -> float:
        return self.index / 1000


def test_every_draw_gives_a_caption_and_draws_meet_the_chances() -> None:
    drawn = Counter(At(0, 0, "", "", i).choose("caption", [("a", 0.5), ("b", 0.2), ("c", 0.3)]) for i in range(1000))
    assert [drawn[text] for text in "abc"] == pytest.approx([500, 200, 300], abs=1)
    halves = [("a", 0.5), ("b", 0.5)]
    assert [At(0, 0, "", "", i).choose("caption", halves) for i in (0, 499, 500, 999)] == ["a", "a", "b", "b"]
    assert At(0, 0, "", "", 1000 - 2**-43).choose("caption", [(str(i), 1 / 7) for i in range(7)]) == "6"


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
