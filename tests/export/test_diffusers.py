"""One exported file, read by diffusers' own ``load_ip_adapter`` and by us: the same predictions, the same pictures.

Predictions for three families and the published heads; pictures through the whole pipeline for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_sdxl
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from ipa.export.loading import load_into
from ipa.export.published import from_published, to_published
from ipa.export.storage import load_adapter, save_adapter
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, draw_noise, generate
from ipa.tools.export import Options, export
from ipa.types import Features

WEIGHT_NAME = "adapter.safetensors"
SEEDS = [3, 4]
TEXTS = ["cat", "a red dog"]
# the sizes that diffusers finds in the file are unlike those of the published ones
HEADS: dict[str, dict[str, int]] = {"global": {}, "fine_grained": {"num_tokens": 6, "heads": 2}, "full": {}}
PUBLISHED = [(family, head) for family in tiny_sdxl.FAMILIES for head in ("global", "fine_grained")]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training run leaves: an adapter that has moved, in fp16."""
    folder = tmp_path_factory.mktemp("run")
    trained = tiny.shake(tiny.make_model("v_prediction", zero_snr=True))
    save_adapter(folder / WEIGHT_NAME, to_published(trained.trainable.state_dict()), {"step": "10"})
    return folder


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def stock(run_folder: Path) -> StableDiffusionPipeline:
    return load_stock(run_folder)


@pytest.fixture(scope="module")
def pooled(ours: IPAdapterModel) -> Tensor:
    return ours.encode_reference(tiny.make_pictures(2, tiny.REFERENCE_PX)).pooled_BE


def stock_pictures(pipeline: StableDiffusionPipeline, options: SamplingOptions, **image: Any) -> Tensor:
    """Pixels in [-1, 1] from the public call, one text after the other."""
    pictures = []
    number = min(len(values) for values in image.values())
    for i, (text, seed) in enumerate(zip(TEXTS[:number], SEEDS[:number], strict=True)):
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


@dataclass
class Pair:
    """Our model and the stock pipeline, on bases of their own with equal weights, both after reading one file."""

    ours: IPAdapterModel
    stock: Any
    file: Path

    def reads(self, *images: Features) -> Tensor:
        """What the stock UNet takes: one tensor of all image prompts, B × N × E or B × N × P × F."""
        found = [image.pooled_BE if self.ours.head.uses == "pooled" else image.patches_BPF for image in images]
        return torch.stack([features for features in found if features is not None], dim=1)

    def predictions(self, images: Sequence[Features], scale: float) -> tuple[Tensor, Tensor]:
        """Ours and that of diffusers."""
        latents, t_B, text, _ = tiny.make_inputs(self.ours)
        self.stock.set_ip_adapter_scale(scale)
        added = (self.ours.family.added_conditions(text) or {}) | {"image_embeds": [self.reads(*images)]}
        theirs = self.stock.unet(latents, t_B, text.states_BLD, added_cond_kwargs=added).sample
        return self.ours.predict(latents, t_B, text, self.ours.image_tokens(*images), scale), theirs


def load_pair(family: str, head: str, folder: Path, **options: Any) -> Pair:
    options, file = options | HEADS[head], folder / WEIGHT_NAME
    tiny.write_adapter(file, head=head, family=tiny_sdxl.FAMILIES[family](), **options)
    ours = tiny.make_model(head=head, family=tiny_sdxl.FAMILIES[family](), **options)
    load_into(ours, file)
    ours.adapter.install()
    stock = tiny_sdxl.FAMILIES[family]().pipeline()
    stock.load_ip_adapter(str(folder), subfolder="", weight_name=WEIGHT_NAME, image_encoder_folder=None)
    return Pair(ours, stock, file)


@pytest.fixture(scope="module", params=[*PUBLISHED, ("sd15", "full")], ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(*request.param, tmp_path_factory.mktemp("pair"))


def make_images(model: IPAdapterModel, count: int) -> list[Features]:
    return [model.encode_reference(tiny.make_pictures(2, tiny.REFERENCE_PX, seed)) for seed in range(count)]


@pytest.mark.parametrize("scale", [0.0, 0.7])
@torch.no_grad()
def test_the_prediction_is_that_of_diffusers(pair: Pair, scale: float) -> None:
    """With the full head too: diffusers' 257 stands for its deprecated way in, else it has a token for every patch.

    Every image makes a difference far above the tolerance, except at λ = 0.
    """
    first, second = make_images(pair.ours, 2)
    latents, t_B, text, _ = tiny.make_inputs(pair.ours)
    made = [pair.ours.family.denoise(latents, t_B, text)]
    for images in ([first], [second], [first, second]):
        prediction, theirs = pair.predictions(images, scale)
        torch.testing.assert_close(prediction, theirs, rtol=0, atol=1e-5)
        made.append(prediction)

    for one, other in combinations(made, 2):
        assert torch.equal(one, other) if scale == 0 else (one - other).abs().max() > 0.01 * scale


@pytest.mark.parametrize("pair", [("sd15", "global"), ("sdxl", "fine_grained")], ids="-".join, indirect=True)
@torch.no_grad()
def test_what_the_tool_converted_gives_the_same_prediction(pair: Pair, tmp_path: Path) -> None:
    name = "converted.bin"
    options = Options(adapter=str(pair.file), out=str(tmp_path / name), dtype="float32")
    assert export(OmegaConf.structured(options)) == tmp_path / name
    pair.stock.unload_ip_adapter()
    pair.stock.load_ip_adapter(str(tmp_path), subfolder="", weight_name=name, image_encoder_folder=None)
    prediction, theirs = pair.predictions(make_images(pair.ours, 1), 1.0)

    torch.testing.assert_close(prediction, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("guidance", "scale"), [(1.0, 0.6), (3.0, 1.0), (3.0, 0.0)])
def test_pictures_are_those_of_the_stock_call_with_embeddings(
    ours, stock, pooled, guidance: float, scale: float
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


def test_pictures_are_those_of_the_stock_call_with_a_picture(ours, run_folder: Path) -> None:
    """``ip_adapter_image=`` through transformers' image encoder with the same weights and its own preprocessing."""
    stock = load_stock(run_folder, **image_parts(ours))
    stock.set_ip_adapter_scale(0.6)
    references = tiny.make_pictures(2, tiny.REFERENCE_PX)
    images = [Image.fromarray(np.asarray(picture.permute(1, 2, 0))) for picture in references]
    options = SamplingOptions(num_steps=3, guidance=3.0, scale=0.6)
    theirs = stock_pictures(stock, options, ip_adapter_image=images)

    torch.testing.assert_close(
        stock.encode_image(images[0], "cpu", 1)[0], ours.encode_reference(references[:1]).pooled_BE, rtol=0, atol=1e-4
    )
    pictures = generate(ours, ours.encode_reference(references), TEXTS, SEEDS, options)
    torch.testing.assert_close(pictures, theirs, rtol=0, atol=1e-4)


def image_parts(model: IPAdapterModel) -> dict[str, Any]:
    """The model's image encoder and its preprocessing as diffusers takes them."""
    side = {"height": tiny.REFERENCE_PX, "width": tiny.REFERENCE_PX}
    processor = CLIPImageProcessor(size={"shortest_edge": tiny.REFERENCE_PX}, crop_size=side)
    return {"image_encoder": tiny.make_vision(model.encoder), "feature_extractor": processor}


@pytest.mark.parametrize(("head", "no_image"), [("fine_grained", "zeros"), ("global", "blank")])
@torch.no_grad()
def test_another_no_image_agrees_with_its_negative_given(head: str, no_image: str, tmp_path: Path) -> None:
    """The calls of docs/diffusers.md; with what diffusers takes by itself the pictures differ."""
    pair = load_pair("sd15", head, tmp_path, no_image=no_image)
    pair.stock.register_modules(**image_parts(pair.ours))
    reference = tiny.make_pictures(1, tiny.REFERENCE_PX)
    prompt = Image.fromarray(np.asarray(reference[0].permute(1, 2, 0)))
    options = SamplingOptions(num_steps=2, guidance=3.0)
    ours = generate(pair.ours, pair.ours.encode_reference(reference), TEXTS[:1], SEEDS[:1], options)
    embeds = pair.stock.prepare_ip_adapter_image_embeds(prompt, None, "cpu", 1, True)
    blank = torch.zeros(1, 3, tiny.REFERENCE_PX, tiny.REFERENCE_PX)
    embeds[0][:1] = 0 if no_image == "zeros" else pair.stock.image_encoder(blank).image_embeds
    agrees = stock_pictures(pair.stock, options, ip_adapter_image_embeds=[embeds])
    by_itself = stock_pictures(pair.stock, options, ip_adapter_image=[prompt])

    torch.testing.assert_close(ours, agrees, rtol=0, atol=1e-4)
    assert (ours - by_itself).abs().max() > 0.01
