"""Pictures: each from its own seed, guided against the empty text without an image."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, draw_noise, generate, rows
from ipa.types import Features

TEXTS = ["cat", "a red dog", "", "hearts", "b"]
SEEDS = [5, 6, 7, 8, 9]
OPTIONS = SamplingOptions(num_steps=3, guidance=3.0, batch_size=8)


@pytest.fixture
def features(model: IPAdapterModel) -> Features:
    return model.encode_reference(tiny.make_pictures(5, tiny.REFERENCE_PX))


@pytest.fixture
def installed(model: IPAdapterModel) -> IPAdapterModel:
    model.adapter.install()
    return model


def record_tokens(model: IPAdapterModel) -> list[Tensor]:
    """The image tokens that the last layer's branch reads, call by call."""
    seen: list[Tensor] = []
    model.adapter.branches[-1].to_k_ip.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    return seen


def test_pictures_are_pixels_in_range(installed: IPAdapterModel, features: Features) -> None:
    pictures = generate(installed, features, TEXTS, SEEDS, OPTIONS)

    assert pictures.shape == (5, 3, tiny.IMAGE_PX, tiny.IMAGE_PX)
    assert pictures.dtype == torch.float32 and not pictures.requires_grad
    assert pictures.isfinite().all() and pictures.abs().max() <= 1


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_do_not_matter(installed: IPAdapterModel, features: Features, batch_size: int) -> None:
    whole = generate(installed, features, TEXTS, SEEDS, OPTIONS)
    parts = generate(installed, features, TEXTS, SEEDS, SamplingOptions(3, 3.0, batch_size=batch_size))

    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)


def test_order_does_not_matter(installed: IPAdapterModel, features: Features) -> None:
    whole = generate(installed, features, TEXTS, SEEDS, OPTIONS)
    order = torch.tensor([3, 0, 4, 2, 1])
    mixed = generate(installed, rows(features, order), [TEXTS[i] for i in order], [SEEDS[i] for i in order], OPTIONS)

    torch.testing.assert_close(mixed, whole[order], rtol=0, atol=1e-4)
    assert (whole[order] - whole).abs().max() > 0.1


def test_the_same_seed_gives_the_same_picture_whatever_was_drawn_before(
    installed: IPAdapterModel, features: Features
) -> None:
    first = generate(installed, features, TEXTS, SEEDS, OPTIONS)
    torch.manual_seed(12)

    assert torch.equal(generate(installed, features, TEXTS, SEEDS, OPTIONS), first)
    assert not torch.equal(generate(installed, features, TEXTS, [seed + 1 for seed in SEEDS], OPTIONS), first)


def test_starting_noise_is_that_of_each_seed() -> None:
    noise = draw_noise((4, 2, 3), [3, 1, 3])

    assert noise.shape == (3, 4, 2, 3)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1], torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1)))


def test_the_unconditional_half_gets_the_tokens_of_no_image(installed: IPAdapterModel, features: Features) -> None:
    seen = record_tokens(installed)
    generate(installed, features, TEXTS, SEEDS, OPTIONS)
    with torch.no_grad():
        blank = installed.head(Features(pooled_BE=torch.zeros(5, tiny.POOLED_WIDTH)))
        tokens = installed.head(features)

    assert len(seen) == OPTIONS.num_steps
    for call in seen:
        torch.testing.assert_close(call, torch.cat([blank, tokens]))


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_there_is_no_unconditional_half(
    installed: IPAdapterModel, features: Features, guidance: float
) -> None:
    seen = record_tokens(installed)
    pictures = generate(installed, features, TEXTS, SEEDS, SamplingOptions(num_steps=2, guidance=guidance))

    assert [len(call) for call in seen] == [5, 5]
    assert pictures.isfinite().all()
    # a hair above 1 has the unconditional half, and it weighs next to nothing
    torch.testing.assert_close(
        generate(installed, features, TEXTS, SEEDS, SamplingOptions(num_steps=2, guidance=1.00001)),
        pictures,
        rtol=0,
        atol=1e-3,
    )


def test_text_image_and_guidance_all_count(installed: IPAdapterModel, features: Features) -> None:
    whole = generate(installed, features, TEXTS, SEEDS, OPTIONS)
    others = [
        generate(installed, features, ["dog"] * 5, SEEDS, OPTIONS),
        generate(installed, Features(pooled_BE=-features.pooled_BE), TEXTS, SEEDS, OPTIONS),
        generate(installed, features, TEXTS, SEEDS, SamplingOptions(num_steps=3, guidance=6.0)),
        generate(installed, features, TEXTS, SEEDS, OPTIONS.with_scale(0.5)),
        generate(installed, features, TEXTS, SEEDS, SamplingOptions(num_steps=4, guidance=3.0)),
    ]

    assert all((other - whole).abs().max() > 0.01 for other in others)


def test_scale_zero_gives_the_pictures_of_the_frozen_base(model: IPAdapterModel, features: Features) -> None:
    options = OPTIONS.with_scale(0.0)
    frozen = generate(model, features, TEXTS, SEEDS, options)
    model.adapter.install()

    assert torch.equal(generate(model, features, TEXTS, SEEDS, options), frozen)
    other = Features(pooled_BE=-features.pooled_BE)
    assert torch.equal(generate(model, other, TEXTS, SEEDS, options), frozen)
    model.adapter.remove()
    assert torch.equal(generate(model, features, TEXTS, SEEDS, OPTIONS), frozen)


def test_pictures_of_another_size(installed: IPAdapterModel, features: Features) -> None:
    pictures = generate(installed, features, TEXTS, SEEDS, SamplingOptions(num_steps=2, image_size_px=32))

    assert pictures.shape == (5, 3, 32, 32)


@pytest.mark.parametrize(("prediction_type", "zero_snr"), tiny.KINDS)
def test_every_kind_of_checkpoint_samples(prediction_type: str, zero_snr: bool) -> None:
    model = tiny.make_model(prediction_type, zero_snr)
    model.adapter.install()
    features = model.encode_reference(tiny.make_pictures(2, tiny.REFERENCE_PX))

    assert generate(model, features, ["a", ""], [0, 1], OPTIONS).isfinite().all()


def test_a_base_in_half_precision_samples(installed: IPAdapterModel, features: Features) -> None:
    whole = generate(installed, features, TEXTS, SEEDS, OPTIONS)
    installed.family.to(torch.bfloat16)
    pictures = generate(installed, features, TEXTS, SEEDS, OPTIONS)

    assert pictures.dtype == torch.float32
    assert (pictures - whole).abs().mean() < 0.1


def test_sampling_leaves_no_prompt_and_no_mode_behind(installed: IPAdapterModel, features: Features) -> None:
    latents, t_B, text, _ = tiny.make_inputs(installed)
    with torch.no_grad():
        before = installed.family.denoise(latents, t_B, text)
        generate(installed, features, TEXTS, SEEDS, OPTIONS)
        assert torch.equal(installed.family.denoise(latents, t_B, text), before)
    assert all(parameter.requires_grad for parameter in installed.trainable.parameters())
