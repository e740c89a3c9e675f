"""One exported file, read by diffusers' own ``load_ip_adapter`` and by us: the same predictions, the same pictures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from ipa.checkpoint import load_adapter, save_adapter
from ipa.export.published import from_published, to_published
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, draw_noise, generate
from ipa.types import Features

WEIGHT_NAME = "adapter.safetensors"
SCALES = [1.0, 0.6, 0.0]
SEEDS = [3, 4]
TEXTS = ["cat", "a red dog"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training run leaves: an adapter that has moved, in fp16."""
    folder = tmp_path_factory.mktemp("run")
    trained = tiny.shake(tiny.make_model("v_prediction", zero_snr=True))
    save_adapter(folder / WEIGHT_NAME, to_published(trained.trainable.state_dict()), {"step": "10"})
    return folder


@pytest.fixture
def ours(run_folder: Path) -> IPAdapterModel:
    model = tiny.make_model("v_prediction", zero_snr=True)
    model.trainable.load_state_dict(from_published(load_adapter(run_folder / WEIGHT_NAME)[0]))
    model.adapter.install()
    return model


def load_stock(run_folder: Path, **parts: Any) -> StableDiffusionPipeline:
    """The public pipeline on a base of its own with the file loaded by diffusers."""
    family = tiny.make_family("v_prediction", zero_snr=True)
    pipeline = tiny.make_pipeline(family, **parts)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_ip_adapter(str(run_folder), subfolder="", weight_name=WEIGHT_NAME, image_encoder_folder=None)
    return pipeline


@pytest.fixture
def stock(run_folder: Path) -> StableDiffusionPipeline:
    return load_stock(run_folder)


@pytest.fixture
def pooled(ours: IPAdapterModel) -> Tensor:
    return ours.encode_reference(tiny.make_pictures(2, tiny.REFERENCE_PX)).pooled_BE


def stock_pictures(pipeline: StableDiffusionPipeline, options: SamplingOptions, **image: Any) -> Tensor:
    """Pixels in [-1, 1] from the public call, one text after the other."""
    pictures = []
    for i, (text, seed) in enumerate(zip(TEXTS, SEEDS, strict=True)):
        out = pipeline(
            text,
            latents=draw_noise((4, 8, 8), [seed]),
            num_inference_steps=options.num_steps,
            guidance_scale=options.guidance,
            height=tiny.IMAGE_PX,
            width=tiny.IMAGE_PX,
            output_type="pt",
            **{name: values[i] for name, values in image.items()},
        )
        pictures.append(out.images * 2 - 1)
    return torch.cat(pictures)


@pytest.mark.parametrize("scale", SCALES)
@torch.no_grad()
def test_the_prediction_is_that_of_diffusers(ours, stock, pooled: Tensor, scale: float) -> None:
    latents, t_B, text, _ = tiny.make_inputs(ours)
    stock.set_ip_adapter_scale(scale)
    theirs = stock.unet(latents, t_B, text.states_BLD, added_cond_kwargs={"image_embeds": [pooled[:, None]]}).sample
    prediction = ours.predict(latents, t_B, text, ours.image_tokens(Features(pooled_BE=pooled)), scale)
    frozen = ours.family.denoise(latents, t_B, text)

    torch.testing.assert_close(prediction, theirs, rtol=0, atol=1e-5)
    assert torch.equal(prediction, frozen) is (scale == 0)


@torch.no_grad()
def test_the_image_makes_a_difference_far_above_the_tolerance(ours, pooled: Tensor) -> None:
    latents, t_B, text, _ = tiny.make_inputs(ours)
    pair = [ours.predict(latents, t_B, text, ours.image_tokens(Features(pooled_BE=p)), 1.0) for p in (pooled, -pooled)]

    assert (pair[0] - pair[1]).abs().max() > 0.1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_are_those_of_the_stock_call_with_embeddings(
    ours, stock, pooled, scale: float, guidance: float
) -> None:
    options = SamplingOptions(num_steps=3, guidance=guidance, scale=scale)
    stock.set_ip_adapter_scale(scale)
    halves = [torch.zeros_like(pooled), pooled] if guidance > 1 else [pooled]
    embeds = [[torch.stack([half[i : i + 1] for half in halves])] for i in range(2)]
    theirs = stock_pictures(stock, options, ip_adapter_image_embeds=embeds)
    pictures = generate(ours, Features(pooled_BE=pooled), TEXTS, SEEDS, options)

    assert embeds[0][0].shape == (len(halves), 1, tiny.POOLED_WIDTH)
    torch.testing.assert_close(pictures, theirs, rtol=0, atol=1e-4)
    assert pictures.std() > 0.05


@pytest.mark.parametrize("scale", SCALES)
def test_pictures_are_those_of_the_stock_call_with_a_picture(ours, run_folder: Path, scale: float) -> None:
    """``ip_adapter_image=`` through transformers' image encoder with the same weights and its own preprocessing."""
    side = {"height": tiny.REFERENCE_PX, "width": tiny.REFERENCE_PX}
    processor = CLIPImageProcessor(size={"shortest_edge": tiny.REFERENCE_PX}, crop_size=side)
    stock = load_stock(run_folder, image_encoder=tiny.make_vision(ours.encoder), feature_extractor=processor)
    stock.set_ip_adapter_scale(scale)
    references = tiny.make_pictures(2, tiny.REFERENCE_PX)
    images = [Image.fromarray(np.asarray(picture.permute(1, 2, 0))) for picture in references]
    options = SamplingOptions(num_steps=3, guidance=3.0, scale=scale)
    theirs = stock_pictures(stock, options, ip_adapter_image=images)

    torch.testing.assert_close(
        stock.encode_image(images[0], "cpu", 1)[0], ours.encode_reference(references[:1]).pooled_BE, rtol=0, atol=1e-4
    )
    pictures = generate(ours, ours.encode_reference(references), TEXTS, SEEDS, options)
    torch.testing.assert_close(pictures, theirs, rtol=0, atol=1e-4)


def test_diffusers_holds_the_very_numbers_of_the_file(run_folder: Path, stock: StableDiffusionPipeline) -> None:
    tensors, _ = load_adapter(run_folder / WEIGHT_NAME)
    for number, processor in enumerate(stock.unet.attn_processors.values()):
        if f"ip_adapter.{number}.to_k_ip.weight" in tensors:
            assert torch.equal(processor.to_k_ip[0].weight, tensors[f"ip_adapter.{number}.to_k_ip.weight"].float())
            assert torch.equal(processor.to_v_ip[0].weight, tensors[f"ip_adapter.{number}.to_v_ip.weight"].float())


def test_our_base_and_theirs_are_two_objects_with_the_same_weights(
    ours: IPAdapterModel, stock: StableDiffusionPipeline
) -> None:
    plain = copy.deepcopy(stock)
    plain.unload_ip_adapter()
    latents = torch.randn(1, 4, 8, 8)
    text = ours.family.encode_text(["cat"])

    assert plain.unet is not ours.family.unet
    with torch.no_grad():
        assert torch.equal(
            plain.unet(latents, 5, text.states_BLD).sample, ours.family.denoise(latents, torch.tensor([5]), text)
        )
