import pytest
import torch

from ipa.types import Channel, ImagePrompt, Posterior, to_uint8, to_unit_range


def test_pixels_survive_the_way_there_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    pixels = to_unit_range(levels)

    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(to_uint8(pixels), levels)


def test_pixels_out_of_range_are_clipped_and_the_others_rounded() -> None:
    pixels = torch.tensor([-3.0, -1.0, -0.999, 0.0, 0.9999, 1.5])

    assert to_uint8(pixels).tolist() == [0, 0, 0, 128, 255, 255]


def test_a_posterior_is_sampled_with_its_standard_deviation() -> None:
    mean, logvar, noise = torch.randn(3, 2, 4, 5, 5).unbind(0)

    assert torch.equal(Posterior(mean, logvar).sample(torch.zeros_like(noise)), mean)
    torch.testing.assert_close(Posterior(mean, logvar).sample(noise), mean + logvar.exp().sqrt() * noise)


def test_a_channel_is_empty_outside_and_nests() -> None:
    channel = Channel()
    outer, inner = (ImagePrompt(torch.randn(1, 4, 8), torch.ones(())) for _ in range(2))
    with channel.carrying(outer):
        with channel.carrying(inner):
            assert channel.prompt is inner
        assert channel.prompt is outer
        with channel.carrying(None):
            assert channel.prompt is None
    assert channel.prompt is None


def test_a_channel_is_empty_again_after_an_error() -> None:
    channel = Channel()
    with (
        pytest.raises(RuntimeError, match="in the denoiser"),
        channel.carrying(ImagePrompt(torch.ones(1), torch.ones(()))),
    ):
        raise RuntimeError("in the denoiser")
    assert channel.prompt is None
