"""Pictures: each from its own seed, guided against the empty text without an image."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_sdxl
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, draw_noise, generate, prompt_arguments, rows
from ipa.types import Features, ImageCondition

TEXTS = ["cat", "a red dog", "", "hearts", "b"]
SEEDS = [5, 6, 7, 8, 9]
OPTIONS = SamplingOptions(num_steps=3, guidance=3.0, batch_size=8)
RESCALED = {"guidance": 6.0, "guidance_rescale": 0.7}


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
    model.adapter.branches[-1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    return seen


def make(model: IPAdapterModel, features: Features, options: SamplingOptions = OPTIONS, **changed: Any) -> Tensor:
    return generate(model, features, changed.get("texts", TEXTS), changed.get("seeds", SEEDS), options)


def test_a_picture_depends_on_its_own_row_alone(installed: IPAdapterModel, features: Features) -> None:
    """Not on its batch, on the order, or on what was drawn before."""
    whole = make(installed, features)
    noise = draw_noise((4, 2, 3), [3, 1, 3])
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1], torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1)))
    assert whole.shape == (5, 3, tiny.IMAGE_PX, tiny.IMAGE_PX)
    assert whole.dtype == torch.float32 and not whole.requires_grad
    assert whole.isfinite().all() and whole.abs().max() <= 1
    for batch_size in (1, 2, 5):
        parts = make(installed, features, SamplingOptions(3, 3.0, batch_size=batch_size))
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = {"texts": [TEXTS[i] for i in order], "seeds": [SEEDS[i] for i in order]}
    torch.testing.assert_close(make(installed, rows(features, order), **moved), whole[order], rtol=0, atol=1e-4)
    assert (whole[order] - whole).abs().max() > 0.1
    torch.manual_seed(12)
    assert torch.equal(make(installed, features), whole)


@pytest.mark.parametrize("head", ["global", "fine_grained", "full"])
def test_the_unconditional_half_gets_the_tokens_of_no_image(head: str) -> None:
    """Zeros for the global head, the blank image for those that read patches."""
    model = tiny.shake(tiny.make_model(head=head))
    model.adapter.install()
    features, seen = model.encode_reference(tiny.make_pictures(5, tiny.REFERENCE_PX)), record_tokens(model)
    make(model, features)
    zeros = Features(pooled_BE=torch.zeros(5, tiny.POOLED_WIDTH))
    with torch.no_grad():
        blank = zeros if head == "global" else model.encoder.blank(5, uses="patches")
        expected = torch.cat([model.head(blank), model.head(features)])

    assert len(seen) == OPTIONS.num_steps
    for call in seen:
        torch.testing.assert_close(call, expected)


def test_keys_and_values_of_a_prompt_are_made_once(installed: IPAdapterModel, features: Features) -> None:
    made: list[Tensor] = []
    for branch in installed.adapter.branches:
        branch.to_k_ip.register_forward_hook(lambda module, inputs, output: made.append(output))
    generate(installed, features, TEXTS, SEEDS, OPTIONS)
    assert len(made) == len(installed.adapter.branches)
    generate(installed, features, TEXTS, SEEDS, OPTIONS)
    assert len(made) == 2 * len(installed.adapter.branches)


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


def test_another_size_and_a_base_in_half_precision(installed: IPAdapterModel, features: Features) -> None:
    assert make(installed, features, SamplingOptions(num_steps=2, image_size_px=32)).shape == (5, 3, 32, 32)
    whole = make(installed, features)
    installed.family.to(torch.bfloat16)
    pictures = make(installed, features)

    assert pictures.dtype == torch.float32
    assert (pictures - whole).abs().mean() < 0.1


def test_sampling_leaves_no_prompt_and_no_mode_behind(installed: IPAdapterModel, features: Features) -> None:
    latents, t_B, text, _ = tiny.make_inputs(installed)
    with torch.no_grad():
        before = installed.family.denoise(latents, t_B, text)
        generate(installed, features, TEXTS, SEEDS, OPTIONS)
        assert torch.equal(installed.family.denoise(latents, t_B, text), before)
    assert all(parameter.requires_grad for parameter in installed.trainable.parameters())


@pytest.mark.parametrize("batch_size", [2, 8])
def test_several_images_follow_one_another_in_both_halves(
    installed: IPAdapterModel, features: Features, batch_size: int
) -> None:
    other, seen = Features(pooled_BE=-features.pooled_BE), record_tokens(installed)
    options = SamplingOptions(num_steps=1, guidance=3.0, batch_size=batch_size)
    pictures = generate(installed, [features, other], TEXTS, SEEDS, options)
    with torch.no_grad():
        blank = installed.head(Features(pooled_BE=torch.zeros(5, tiny.POOLED_WIDTH)))
        tokens = [torch.cat([blank, blank], dim=1), installed.image_tokens(features, other)]

    for call, index in zip(seen, torch.arange(5).split(batch_size), strict=True):
        torch.testing.assert_close(call, torch.cat([half[index] for half in tokens]))
    alone = [generate(installed, image, TEXTS, SEEDS, options) for image in (features, other, [features])]
    assert torch.equal(alone[0], alone[2])
    assert all((each - pictures).abs().max() > 0.01 for each in alone)


def stock_pipeline(model: IPAdapterModel) -> Any:
    """The public pipeline on the same base, made without us."""
    family = model.family
    scheduler = DDIMScheduler.from_config(family.scheduler.config, clip_sample=False)
    if family.name != "sdxl":
        return tiny.make_pipeline(family, scheduler=scheduler)
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
    parts = {name: getattr(family, name) for name in names}
    pipeline = StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_pictures(model: IPAdapterModel, options: SamplingOptions, **prompts: Any) -> Tensor:
    """Pixels in [-1, 1]."""
    pictures = stock_pipeline(model)(
        **prompts,
        latents=draw_noise((4, 8, 8), SEEDS),
        num_inference_steps=options.num_steps,
        guidance_scale=options.guidance,
        guidance_rescale=options.guidance_rescale,
        output_type="pt",
    ).images
    return pictures * 2 - 1


@pytest.mark.parametrize(
    ("family", "head", "guidance", "scale"),
    [
        ("sd15", "global", 3.0, 0.5),
        ("sd21", "fine_grained", 1.0, 1.0),
        ("sdxl", "global", 3.0, 0.5),
    ],
)
@torch.no_grad()
def test_a_simple_adapter_makes_the_pictures_of_the_stock_call_with_embeddings(
    family: str, head: str, guidance: float, scale: float
) -> None:
    model = tiny.shake(tiny.make_model(head=head, kind="simple", family=tiny_sdxl.FAMILIES[family]()))
    model.adapter.install()
    features = model.encode_reference(tiny.make_pictures(5, tiny.REFERENCE_PX))
    empty = model.encoder.blank(5, uses=model.head.uses)
    if head == "global":
        empty = empty.map(torch.zeros_like)
    encoded = stock_pipeline(model).encode_prompt(
        TEXTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=[""] * 5
    )
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    prompts = dict(zip(names, encoded, strict=False))
    for name, image in zip(names, [features, empty], strict=False):
        prompts[name] = torch.cat([prompts[name], scale * model.head(image)], dim=1)
    options = SamplingOptions(num_steps=3, guidance=guidance, scale=scale)
    pictures = generate(model, features, TEXTS, SEEDS, options)

    torch.testing.assert_close(pictures, stock_pictures(model, options, **prompts), rtol=0, atol=1e-5)
    assert (generate(model, features, TEXTS, SEEDS, options.with_scale(0.0)) - pictures).abs().max() > 0.01
    with prompt_arguments([(model, [ImageCondition([features], scale=scale)])], TEXTS) as arguments:
        pass  # they serve after leaving
    torch.testing.assert_close(stock_pictures(model, options, **arguments), pictures, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "family"), [("decoupled", "sd21"), ("decoupled", "sdxl"), ("simple", "sdxl")])
@torch.no_grad()
def test_scale_zero_gives_the_frozen_bases_pictures_and_those_of_the_stock_pipeline(kind: str, family: str) -> None:
    model = tiny.shake(tiny.make_model(kind=kind, family=tiny_sdxl.FAMILIES[family]()))
    features = model.encode_reference(tiny.make_pictures(5, tiny.REFERENCE_PX))
    off, other = OPTIONS.with_scale(0.0), Features(pooled_BE=-features.pooled_BE)
    frozen, rescaled = (generate(model, features, TEXTS, SEEDS, each) for each in (off, replace(off, **RESCALED)))
    model.adapter.install()

    for pictures, options in ((frozen, off), (rescaled, replace(off, **RESCALED))):
        stock = stock_pictures(model, options, prompt=TEXTS, negative_prompt=[""] * 5)
        torch.testing.assert_close(pictures, stock, rtol=0, atol=1e-5)
    assert (rescaled - frozen).abs().max() > 0.01
    assert all(torch.equal(generate(model, each, TEXTS, SEEDS, off), frozen) for each in (features, other))
    assert (generate(model, features, TEXTS, SEEDS, OPTIONS) - frozen).abs().max() > 0.01
    model.adapter.remove()
    assert kind == "simple" or torch.equal(generate(model, features, TEXTS, SEEDS, OPTIONS), frozen)


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("num_steps", n) for n in (0, -1, 1001)), *(("guidance_rescale", n) for n in (-0.1, 1.5, float("nan")))],
)
def test_what_is_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SamplingOptions(**{name: value})
