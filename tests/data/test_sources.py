"""Sources: YAML values → shards that are read alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from tars import good, png, write_tar

from ipa.data.records import Record
from ipa.data.shards.source import Layout, ShardSource

CONF = Path(__file__).parents[2] / "conf" / "source"
VALUES: dict[str, Any] = {
    "weight": 2,
    "captions": {"txt": 1, "json.alt": 3},
    "reference": ["ref.jpg"],
    "filters": {"small": {"key": "short_side_px", "min": 8}},
}


def make(shards: Any, **values: Any) -> ShardSource:
    return ShardSource.of("mine", shards=shards, **values)


def test_a_source_reads_its_shards_as_its_values_say(clean_shards: list[str], tmp_path: Path) -> None:
    members = [*good("a", "from txt"), ("a.ref.jpg", b"reference"), ("a.blip", b"from blip"), *good("b")]
    source = make(write_tar(tmp_path / "x/0.tar", members), captions="blip", reference="REF.jpg")
    record, reject = source.read(source.shards[0])
    assert isinstance(record, Record) and not isinstance(reject, Record)
    assert (record.captions[0][0], record.references, reject.reason) == ("from blip", (b"reference",), "no caption")
    assert [len(list(make(clean_shards).read(shard))) for shard in clean_shards] == [7, 5, 8]


def test_values_from_hydra_become_plain(clean_shards: list[str]) -> None:
    source = make(clean_shards, **VALUES)
    assert source == ShardSource.of("mine", **OmegaConf.create({"shards": clean_shards, **VALUES}))  # type: ignore[arg-type]
    assert source.weight == 2.0 and source.layout.references == ("ref.jpg",)
    assert (
        make(clean_shards).layout == make(clean_shards, captions="txt", reference=None, filters={}).layout == Layout()
    )


@pytest.mark.parametrize(
    "other",
    [
        {"captions": "txt"},
        {"captions": {"txt": 1, "json.alt": 4}},
        {"captions": {"json.alt": 3, "txt": 1}},
        {"captions": {"keys": ["txt", "json.alt"], "choice": "random"}},
        {"reference": None},
        {"image": "photo.png"},
        {"loss_mask": "mask.png"},
        {"loss_mask": "alpha"},
        {"reference_mask": "mask.png"},
        {"reference": ["ref.png"]},
        {"filters": None},
        {"filters": {"small": {"key": "short_side_px", "min": 9}}},
        {"filters": {"small": {"key": "short_side_px", "min": 8, "missing": "keep"}}},
    ],
)
def test_the_fingerprint_covers_all_that_decides_what_is_read(clean_shards: list[str], other: dict[str, Any]) -> None:
    assert make(clean_shards, **{**VALUES, **other}).fingerprint() != make(clean_shards, **VALUES).fingerprint()


def test_the_fingerprint_covers_shards_and_their_order_but_not_their_folders(clean_shards: list[str]) -> None:
    """And does not change between versions."""
    assert make("s3://bucket/{0..1}.tar", **VALUES).fingerprint() == "41bf0aa0bf368af5"
    source = make(clean_shards)
    elsewhere = [f"s3://bucket/{Path(shard).name}" for shard in clean_shards]
    assert make(elsewhere).fingerprint() == source.fingerprint() == ShardSource.of("it", shards=elsewhere).fingerprint()
    assert make(clean_shards[::-1]).fingerprint() != source.fingerprint() != make(clean_shards[:2]).fingerprint()
    assert (
        make(["s3://b/1.tar", "s3://b/23.tar"]).fingerprint() != make(["s3://b/12.tar", "s3://b/3.tar"]).fingerprint()
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"caption_key": "txt"},
            r"data has no caption_key; there are shards, weight, captions, image, reference, filters",
        ),
        ({"captions": 3}, r"data\.captions=3: give"),
        ({"filters": {"small": {"key": "short_side_px"}}}, r"data\.filters\.small: give min, max or both"),
        *(({"weight": weight}, rf"data\.weight={weight}: give a number above 0") for weight in (0, -1, "much", True)),
        *(
            (
                {"reference": reference},
                r"data\.reference=.*give the extension of a member \(ref\.jpg of 0001\.ref\.jpg\)",
            )
            for reference in ("", ".ref.jpg", ["ref.jpg", "REF.jpg"], [3], "json", "json.ref", 3)
        ),
    ],
)
def test_what_cannot_be_read_is_refused(clean_shards: list[str], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make(clean_shards, **values)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_can_be_read(path: Path, tmp_path: Path) -> None:
    scores = "similarity punsafe pwatermark aesthetic clip_similarity_vitl14 nsfw_score_opennsfw2 watermark_score"
    best = {name: 0.0 if name.startswith(("p", "nsfw", "water")) else 9.0 for name in scores.split()}
    metadata = json.dumps({**best, "aesthetic_score_laion_v2": 6.0}).encode()
    members = [("a.jpg", png((600, 512))), ("a.txt", b"a red thing"), ("a.json", metadata)]
    values = yaml.safe_load(path.read_text())
    assert values.pop("shards") is None
    source = ShardSource.of(path.stem, shards=write_tar(tmp_path / "0.tar", members), **values)
    [record] = source.read(source.shards[0])
    assert isinstance(record, Record)
