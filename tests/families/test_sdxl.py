"""Stable Diffusion XL against its public pipeline: text, added conditions, the UNet's call, whole pictures."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_sdxl
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from ipa.errors import UserError
from ipa.families.sdxl import StableDiffusionXL
from ipa.types import TextCondition, to_unit_range

SIZES = torch.tensor([[300, 451, 7, 0, 64, 64], [300, 451, 7, 0, 64, 64]])


@pytest.fixture
def family() -> StableDiffusionXL:
    return tiny_sdxl.make_family()


def wrap(public: StableDiffusionXLPipeline) -> StableDiffusionXL:
    """A family of the pipeline's very parts: weights at other addresses round differently."""
    parts = {name: part for name, part in public.components.items() if name not in StableDiffusionXL.absent}
    return StableDiffusionXL(**parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline folder with the schedule as SDXL is published."""
    folder = tmp_path_factory.mktemp("tiny") / "sdxl"
    made = tiny_sdxl.make_family()
    pipeline = made.pipeline()
    pipeline.scheduler = made.scheduler
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def public(folder: Path) -> StableDiffusionXLPipeline:
    """The stock pipeline with DDIM, loaded by diffusers alone."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def record_calls(unet: torch.nn.Module) -> list[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """Every later call of the UNet as (arguments, keyword arguments, result)."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    unet.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    return calls


def halves(negative: TextCondition, positive: TextCondition) -> TextCondition:
    """A doubled batch, as guidance calls the denoiser."""
    pairs = zip(vars(negative).values(), vars(positive).values(), strict=True)
    return TextCondition(*(None if pair[0] is None else torch.cat(pair) for pair in pairs))


def test_the_text_is_encoded_as_the_public_pipeline_does(
    family: StableDiffusionXL, public: StableDiffusionXLPipeline
) -> None:
    texts = ["cat", "a much longer red dog than fits"]
    states, negative_states, pooled, negative_pooled = public.encode_prompt(texts, negative_prompt=["", "b"])
    positive, negative = family.encode_text(texts), family.encode_text(["", "b"])

    assert torch.equal(positive.states_BLD, states) and torch.equal(positive.pooled_BE, pooled)
    assert torch.equal(negative.states_BLD, negative_states) and torch.equal(negative.pooled_BE, negative_pooled)
    assert states.shape == (2, tiny.TEXT_LENGTH, tiny_sdxl.CONTEXT_WIDTH)
    assert pooled.shape == (2, tiny_sdxl.POOLED_WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_public_pipeline_and_stay_whole_numbers_of_pixels(
    family: StableDiffusionXL, public: StableDiffusionXLPipeline, dtype: torch.dtype
) -> None:
    edge = family.image_size_px
    whole = public._get_add_time_ids((edge, edge), (0, 0), (edge, edge), dtype, tiny_sdxl.POOLED_WIDTH)
    cropped = public._get_add_time_ids((512, 768), (0, 128), (512, 512), dtype, tiny_sdxl.POOLED_WIDTH)
    given = torch.tensor([[512, 768, 0, 128, 512, 512]])
    odd = torch.tensor([[1023, 1021, 3, 257, 1023, 1021]])  # none of the large ones is a bfloat16
    family = family.to(dtype)

    assert torch.equal(family.encode_text(["cat"] * 3).size_B6, whole.float().expand(3, 6))
    assert torch.equal(family.encode_text(["cat"], given).size_B6, cropped.float())
    assert torch.equal(family.encode_text(["cat"], odd).size_B6, odd.float())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_denoiser_is_called_as_in_the_public_pipeline(public: StableDiffusionXLPipeline, guidance: float) -> None:
    family, texts, empty = wrap(public), ["cat", "a red dog"], ["", ""]
    recorded = record_calls(public.unet)
    public(
        texts,
        negative_prompt=empty,
        original_size=(300, 451),
        crops_coords_top_left=(7, 0),
        target_size=(64, 64),
        num_inference_steps=2,
        guidance_scale=guidance,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    calls, text = list(recorded), family.encode_text(texts, SIZES)
    if guidance > 1:
        text = halves(family.encode_text(empty, SIZES), text)

    assert len(calls) == 2
    for (latents, t), arguments, (prediction,) in calls:
        added = family.added_conditions(text)
        assert added.keys() == arguments["added_cond_kwargs"].keys()
        assert all(torch.equal(added[name], value) for name, value in arguments["added_cond_kwargs"].items())
        with torch.no_grad():
            assert torch.equal(family.denoise(latents, t.expand(len(latents)), text), prediction)


def test_text_pooled_text_sizes_and_appended_tokens_are_all_heard(family: StableDiffusionXL) -> None:
    latents, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    cat, dog = family.encode_text(["cat"]), family.encode_text(["dog"])
    cropped = family.encode_text(["cat"], torch.tensor([[16, 16, 5, 0, 16, 16]]))
    more = torch.cat([cat.states_BLD, torch.randn(1, 4, tiny_sdxl.CONTEXT_WIDTH)], dim=1)
    mixed = [cat, TextCondition(dog.states_BLD, cat.pooled_BE, cat.size_B6)]
    mixed += [TextCondition(cat.states_BLD, dog.pooled_BE, cat.size_B6), cropped]
    mixed.append(TextCondition(more, cat.pooled_BE, cat.size_B6))
    added = {"text_embeds": cat.pooled_BE, "time_ids": cat.size_B6}
    with torch.no_grad():
        predictions = [family.denoise(latents, t, text) for text in mixed]
        expected = family.unet(latents, t, more, added_cond_kwargs=added).sample

    assert all((other - predictions[0]).abs().max() > 1e-4 for other in predictions[1:])
    assert torch.equal(predictions[-1], expected)


def test_its_pipeline_makes_the_pictures_of_the_public_one(public: StableDiffusionXLPipeline) -> None:
    family, texts, empty = wrap(public), ["cat", "a red dog"], ["", ""]
    latents = torch.randn(2, 4, 8, 8)
    how = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", "latents": latents}
    sizes = {"original_size": (300, 451), "crops_coords_top_left": (7, 0), "target_size": (64, 64)}
    theirs = public(texts, negative_prompt=empty, **sizes, **how).images
    arguments = family.prompt_arguments(family.encode_text(texts, SIZES), family.encode_text(empty, SIZES))
    pipeline = family.pipeline()

    assert torch.equal(pipeline(**arguments, **how).images, theirs)
    assert (pipeline.watermark, pipeline.unet, pipeline.vae) == (None, family.unet, family.vae)


def test_the_pipelines_arguments_have_one_set_of_sizes_and_a_negative_text_if_there_is_one(
    family: StableDiffusionXL,
) -> None:
    text = family.encode_text(["cat", "dog"])
    own = {"prompt_embeds", "pooled_prompt_embeds"}
    sizes = {"original_size", "crops_coords_top_left", "target_size"}
    assert family.prompt_arguments(text, None).keys() == own | sizes
    text.size_B6 = None
    assert family.prompt_arguments(text, text).keys() == own | {f"negative_{name}" for name in own}

    other, text = SIZES.clone(), family.encode_text(["cat", "dog"], SIZES)
    other[1, 2] = 8
    for positive, negative in [(family.encode_text(["cat", "dog"], other), None), (text, family.encode_text(["", ""]))]:
        with pytest.raises(UserError, match=r"one set of sizes, but these differ: \[\[.*Group the pictures by size"):
            family.prompt_arguments(positive, negative)


def test_the_vae_can_have_another_type_than_the_rest(folder: Path, family: StableDiffusionXL) -> None:
    loaded = StableDiffusionXL.from_pretrained(str(folder), dtype="float16", vae_dtype="float32")
    half = {parameter.dtype for part in (loaded.unet, loaded.text_encoder_2) for parameter in part.parameters()}
    pixels = to_unit_range(tiny.make_pictures(2, tiny.IMAGE_PX))

    assert half == {torch.float16}
    assert torch.equal(loaded.encode_pixels(pixels).mean_BCHW, family.encode_pixels(pixels).mean_BCHW)
    for option, wrong in (("vae_dtype", "float31"), ("dtype", "int64")):
        with pytest.raises(UserError, match=rf"base\.{option}={wrong}: give float32"):
            StableDiffusionXL.from_pretrained(str(folder), **{option: wrong})
