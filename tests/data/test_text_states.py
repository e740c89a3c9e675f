"""Text states in a feature cache: rounding, what is left out and put back, damaged ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cache import HEADER, address, make_record, make_tensors

from ipa.data.cache.format import HEADER as HEADER_NAME
from ipa.data.cache.format import Header, WrongCache, pack, unpack, with_states
from ipa.data.cache.preparation import CachedPreparation
from ipa.data.cache.states import TEXTS, Texts, from_stored, shapes_of, to_stored, without_unread
from ipa.data.rejects import Rejected
from ipa.types import TextInputs

SIZES: dict[str, Any] = {"latent_shape": [2, 3, 4], "reference_size_px": 6, "kept": []}


def make_states(captions: int = 2, read: int = 5) -> TextInputs:
    """Of tokens behind ``read`` nothing is read."""
    mask = torch.arange(7).expand(captions, 7) < read
    states = {"t5": torch.randn(captions, 7, 6) * 10 ** torch.linspace(-3, 2, 6), "pooled": torch.randn(captions, 3)}
    return without_unread(states | {"mask": mask.int()}, mask)


def sample_bytes(states: TextInputs, kind: str) -> bytes:
    return with_states(pack(make_record(), make_tensors(), None), to_stored(states, kind))


def preparation(states: TextInputs, kind: str) -> CachedPreparation:
    return CachedPreparation(sizes=SIZES | {"text": {"kept": kind, "shapes": shapes_of(states)}})


@pytest.mark.parametrize("read", [0, 1, 5, 7])
def test_states_come_back_rounded_to_bfloat16_without_the_tokens_that_nothing_reads(read: int) -> None:
    states = make_states(read=read)
    record = make_record(picture=sample_bytes(states, "states"))
    _, arrays = unpack(record.picture)
    batch = preparation(states, "states").batch([preparation(states, "states").sample(record, address())] * 2, [])
    chosen = ["a cat", "a red cat"].index(batch.text[0])

    assert arrays["states.t5"].shape == (2, read, 6) and "text.ids" not in arrays and batch.text_inputs is None
    for name, x in states.items():
        expected = x[chosen].bfloat16() if x.is_floating_point() else x[chosen]
        assert torch.equal(batch.text_states[name][1], expected)


def test_eight_bits_are_within_the_rounding_of_e4m3_for_each_token() -> None:
    """Three bits of mantissa: half a step is 2⁻⁴ of a number, or 2⁻¹⁰ of the scale below the normal range."""
    states = make_states()
    rows = {name: array[0] for name, array in unpack(sample_bytes(states, "states_fp8"))[1].items()}
    found, x = from_stored(rows, shapes_of(states)), states["t5"][0]
    scale = x.abs().amax(-1, keepdim=True) / 448

    assert rows["states.t5"].itemsize == 1 and torch.equal(found["pooled"], states["pooled"][0].bfloat16())
    assert ((found["t5"].float() - x).abs() <= (2**-4 + 2**-8) * x.abs() + 2**-10 * scale).all()


@pytest.mark.parametrize("missing", ["states.t5", "states.t5.scale", "states.mask", None])
def test_states_that_are_not_the_headers_are_rejected(missing: str | None) -> None:
    states = make_states()
    stored = {name: x for name, x in to_stored(states, "states_fp8").items() if name != missing}
    others = states if missing else {**states, "t5": states["t5"][:, :4]}
    record = make_record(picture=with_states(pack(make_record(), make_tensors(), None), stored))
    with pytest.raises(Rejected, match="states"):
        preparation(others, "states_fp8").sample(record, address())


@pytest.mark.parametrize(
    "text",
    [
        1,
        {"kept": "all", "shapes": {"t5": [1, 2]}},
        {"kept": "states", "shapes": {"t5": []}},
        {"kept": "states", "shapes": {"t5": [10**5, 10**5]}},
    ],
)
def test_headers_with_impossible_states_are_refused(text: Any) -> None:
    header = Header("train", {}, {}, HEADER.sizes | {"text": text})
    with pytest.raises(WrongCache, match=r"is damaged: text: "):
        Header.read("cache.header.json", header.written(), "00000.tar")


def test_a_header_does_not_depend_on_the_order_of_its_states() -> None:
    """Or the command that made a cache would refuse it, and could add no texts."""
    made = Header("train").with_states("states", {"t5": [7, 6], "pooled": [3]}, "encoder")
    read = Header.read(HEADER_NAME, made.written(), "00000.tar")

    assert not read.differences(made)
    assert read.differences(Header("train").with_states("states", {"t5": [7, 5], "pooled": [3]}, "encoder"))


def test_texts_are_read_as_written_or_refused_by_name(tmp_path: Path) -> None:
    rows = {name: x[0] for name, x in make_states().items()}
    content = Texts("float32 1", {"": rows, "a cat\n": rows}).written()
    (tmp_path / TEXTS).write_bytes(content)
    found = Texts.read(str(tmp_path / TEXTS))

    assert found.encoder == "float32 1" and list(found.states) == ["", "a cat\n"] and found.has([""])
    assert all(torch.equal(found.states["a cat\n"][name], x) for name, x in rows.items())
    for damaged in (b"", content[:20], content[:-1], b"\x05" + content[1:]):
        (tmp_path / TEXTS).write_bytes(damaged)
        with pytest.raises(WrongCache, match=r"texts\.safetensors cannot be read .*ipa\.tools\.precompute"):
            Texts.read(str(tmp_path / TEXTS))
