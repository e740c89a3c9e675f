"""Terms that are taken out of captions."""

import json
from pathlib import Path

import pytest
from tars import png, write_tar

from ipa.data.shards.source import ShardSource
from ipa.data.shards.strip import Strip, remove
from ipa.errors import UserError


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a cat, oil painting, by Van Gogh", "a cat"),
        ("a cat in the style of van gogh", "a cat"),
        ("An Oil Painting of a cat", "a cat"),
        ("A dog, watercolor of a cat", "A dog, a cat"),
        ("a cat (oil painting), red", "a cat, red"),
        ("a cat, watercolor, oil painting, red", "a cat, red"),
        ("oil_painting, a cat", "a cat"),
        ("a cat as a watercolor. And a dog", "a cat. And a dog"),
        ("a watercolor", ""),
        ("watercolors by van goghs", "watercolors by van goghs"),  # other words
        ("  a  cat ,red ", "  a  cat ,red "),  # nothing to remove, so nothing changes
    ],
)
def test_terms_go_with_what_they_leave_behind(before: str, after: str) -> None:
    strip = Strip(("oil painting", "watercolor", "van gogh"))
    assert strip.apply(before, [])[0] == after


def test_the_longest_term_counts_and_removed_ones_are_named() -> None:
    assert remove("a cat, oil painting, Oil", ["oil", "oil painting"]) == ("a cat", ["oil painting", "Oil"])


def test_terms_come_from_files_and_from_the_samples_own_metadata(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("# styles\nEtching\n\n'ink wash'\n")
    entries = [{"artist": "Ann Lee"}, {"artist": ["Bo", "ink"]}, {"artist": None}, {"artist": 3}, "no metadata"]
    members = [
        member
        for number, entry in enumerate(entries)
        for member in [
            (f"{number}.json", json.dumps(entry).encode()),
            (f"{number}.txt", b"a tree, etching, by Ann Lee and Bo"),
            (f"{number}.png", png()),
        ]
    ]
    shard = write_tar(tmp_path / "0.tar", members)
    strip = Strip.of([str(words), "json.artist"])
    assert strip == Strip(("etching", "ink wash"), ("artist",))
    source = ShardSource.of("train", shards=shard, strip=strip)

    texts = [record.captions[0][0] for record in source.read(shard)]

    assert texts == ["a tree, and Bo", "a tree, by Ann Lee", *["a tree, by Ann Lee and Bo"] * 3]
    assert source.fingerprint() != ShardSource.of("train", shards=shard).fingerprint()
    assert source.layout_fingerprint() == ShardSource.of("train", shards=shard).layout_fingerprint()


def test_filters_see_the_caption_as_it_is_stored(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", [("0.txt", b"ink wash"), ("0.png", png())])
    filters = {"long": {"key": "caption_words", "min": 2}}
    source = ShardSource.of("train", shards=shard, filters=filters, strip=Strip(("ink wash",)))
    (record,) = source.read(shard)
    assert record.captions == (("", 1.0),)


@pytest.mark.parametrize(
    ("content", "given", "complaint"),
    [
        (None, "FILE", "cannot be read"),
        ("# nothing\n", "FILE", "a term on each line"),
        ("etching\n--\n", "FILE", "a term on each line"),
        ("etching", {"a": 1}, "files with a term per line, and json.NAME"),
        ("etching", [3], "files with a term per line"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str | None, given: object, complaint: str) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_text(content)
    with pytest.raises(UserError, match=rf"data\.pairs\.strip.*{complaint}"):
        Strip.of([f"{tmp_path}/words.txt"] if given == "FILE" else given)
