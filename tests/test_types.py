from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from ipa.types import Batch, Channel, Features, ImagePrompt, Posterior, to_uint8, to_unit_range


def test_pixels_survive_the_way_there_and_back_and_are_clipped_and_rounded() -> None:
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    pixels = to_unit_range(levels)

    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(to_uint8(pixels), levels)
    assert to_uint8(torch.tensor([-3.0, -1.0, -0.999, 0.0, 0.9999, 1.5])).tolist() == [0, 0, 0, 128, 255, 255]


def test_a_channel_nests_and_is_empty_outside_also_after_an_error() -> None:
    channel = Channel()
    outer, inner = (ImagePrompt(torch.randn(1, 4, 8), torch.ones(())) for _ in range(2))

    def fail() -> None:
        with channel.carrying(inner):
            assert channel.prompt is inner
            raise RuntimeError("in the denoiser")

    with channel.carrying(outer):
        with pytest.raises(RuntimeError, match="in the denoiser"):
            fail()
        assert channel.prompt is outer
        with channel.carrying(None):
            assert channel.prompt is None
    assert channel.prompt is None


def cached_batch() -> Batch:
    """With every field that a batch can have."""
    batch = tiny.make_batch(3)
    return replace(
        batch,
        posterior=Posterior(*torch.randn(2, 3, 4, 2, 2).half()),
        features=Features(torch.randn(3, 5), torch.randn(3, 7, 6)),
        text_inputs={"ids": torch.arange(12).view(3, 4)},
        size_B6=torch.zeros(3, 6, dtype=torch.int64),
    )


def test_a_batch_is_mapped_in_all_its_tensors_and_nothing_else() -> None:
    batch, seen = cached_batch(), list[Tensor]()
    mapped = batch.map(lambda x: seen.append(x) or x.to("meta"))

    assert len(seen) == 5 + 2 + 2 + 2 + 2
    assert mapped.posterior.mean_BCHW.is_meta and mapped.features.patches_BPF.is_meta
    assert mapped.text_inputs["ids"].is_meta
    assert mapped.draws.time_B.is_meta and mapped.size_B6.is_meta and mapped.reference_B3HW.is_meta
    assert mapped.text == batch.text and len(mapped) == 3
    few = replace(batch, image_B3HW=None, posterior=None, features=None).map(lambda x: x)
    assert (few.image_B3HW, few.posterior, few.features) == (None, None, None)


def test_neighbours_lend_their_picture_and_nothing_else() -> None:
    batch = cached_batch()
    other = batch.with_neighbours_image()

    assert torch.equal(other.reference_B3HW, batch.reference_B3HW[[2, 0, 1]])
    assert torch.equal(other.features.pooled_BE, batch.features.pooled_BE[[2, 0, 1]])
    assert torch.equal(other.features.patches_BPF, batch.features.patches_BPF[[2, 0, 1]])
    assert other.posterior is batch.posterior and other.text_inputs is batch.text_inputs and other.draws is batch.draws
    nothing = replace(batch, reference_B3HW=None, features=None).with_neighbours_image()
    assert (nothing.reference_B3HW, nothing.features) == (None, None)
