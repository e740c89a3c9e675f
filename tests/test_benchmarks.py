"""The benchmarks on tiny parts: they compare the same computation, and report their results. Nothing is timed here."""

import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import memory
import sample
import step
from reference import ReferenceStep


def test_sampling_with_us_and_with_diffusers_gives_the_same_images() -> None:
    model = tiny.shake(tiny.make_model())
    found = sample.compare(model, batch=2, image_px=tiny.IMAGE_PX, steps=2, rounds=1)
    told = sample.in_markdown({"rounds": 1, "results": [{"size": "tiny", "head": "global", **found}]})

    assert {name: len(each) for name, each in found["seconds"].items()} == {sample.OURS: 1, sample.THEIRS: 1}
    assert f"| tiny, global | 2 | {tiny.IMAGE_PX} | 2 |" in told


def test_different_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.shake(tiny.make_model())
    stock = sample.stock_pipeline(model)
    tiny.shake(model, seed=2)
    monkeypatch.setattr(sample, "stock_pipeline", lambda model: stock)

    with pytest.raises(AssertionError, match="the pictures differ by"):
        sample.compare(model, batch=1, image_px=tiny.IMAGE_PX, steps=2, rounds=1)


def test_the_reference_computes_our_loss() -> None:
    """For the same batch with drops; ours through the adapter, the reference through diffusers' processors."""
    model = tiny.shake(tiny.make_model())
    model.adapter.install()
    batch = memory.make_batch(model, 8, tiny.IMAGE_PX, cached=False)
    assert batch.draws.drop_image_B.any() or batch.draws.drop_text_B.any()
    ours = model.errors(batch).loss.detach()
    model.adapter.remove()

    torch.testing.assert_close(ReferenceStep(model).loss(batch).detach(), ours, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_steps_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.models.MAKERS, "tiny", tiny.make_model)
    monkeypatch.setitem(step.SETTINGS, "tiny", step.Setting())
    monkeypatch.setattr(step, "take_turns", partial(step.take_turns, warm_up=0))
    found = step.compare("tiny", 2, tiny.IMAGE_PX, rounds=1, device=torch.device("cpu"), compiles=False)
    told = step.in_markdown({"results": [found, {**found, "seconds": None}], "each": {}})

    assert found["seconds"].keys() == {*step.REFERENCES, "online", "cached", "online, encoders in bf16"}
    assert found["tflop_per_sample"]["cached"] < found["tflop_per_sample"]["online"]
    assert "| cached |" in told and "Out of memory." in told


def test_what_fits_a_card_leaves_the_reserve() -> None:
    """Beyond four samples another part dominates, and each sample takes more."""
    found = {1: 5 * memory.GIB, 4: 6 * memory.GIB, 16: 18 * memory.GIB}

    assert [memory.largest_batch(found, card) for card in (4, 6.9, 8, 16)] == [0, 2, 4, 12]
    assert memory.usable(8) == 0.95 * 7 * memory.GIB
