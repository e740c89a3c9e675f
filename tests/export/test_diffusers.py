"""One exported file, read by diffusers' own ``load_ip_adapter`` and by us: the same predictions, the same pictures.

Predictions for three families and the published heads; pictures through the whole pipeline for one.
"""

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
from diffusers import StableDiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from ipa.export.loading import load_into
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


@pytest.mark.parametrize("pair", [("sdxl", "fine_grained")], ids="-".join, indirect=True)
@torch.no_grad()
def test_what_the_tool_converted_gives_the_same_prediction(pair: Pair, tmp_path: Path) -> None:
    name = "converted.bin"
    options = Options(adapter=str(pair.file), out=str(tmp_path / name), dtype="float32")
    assert export(OmegaConf.structured(options)) == tmp_path / name
    pair.stock.unload_ip_adapter()
    pair.stock.load_ip_adapter(str(tmp_path), subfolder="", weight_name=name, image_encoder_folder=None)
    prediction, theirs = pair.predictions(make_images(pair.ours, 1), 1.0)

    torch.testing.assert_close(prediction, theirs, rtol=0, atol=1e-5)


def image_parts(model: IPAdapterModel) -> dict[str, Any]:
    """The model's image encoder and its preprocessing as diffusers takes them."""
    side = {"height": tiny.REFERENCE_PX, "width": tiny.REFERENCE_PX}
    processor = CLIPImageProcessor(size={"shortest_edge": tiny.REFERENCE_PX}, crop_size=side)
    return {"image_encoder": tiny.make_vision(model.encoder), "feature_extractor": processor}


@pytest.mark.parametrize(
    ("family", "head", "no_image"),
    [("sd21", "global", "zeros"), ("sd15", "fine_grained", "zeros"), ("sd15", "global", "blank")],
)
@torch.no_grad()
def test_pictures_are_those_of_the_stock_call(family: str, head: str, no_image: str, tmp_path: Path) -> None:
    """``ip_adapter_image=`` through transformers' image encoder with the same weights and its own preprocessing.

    Another no_image than diffusers takes needs the calls of docs/diffusers.md; by itself it makes other pictures.
    """
    pair = load_pair(family, head, tmp_path, no_image=no_image)
    pair.stock.register_modules(**image_parts(pair.ours))
    pair.stock.set_ip_adapter_scale(0.6)
    references = tiny.make_pictures(2, tiny.REFERENCE_PX)
    images = [Image.fromarray(np.asarray(picture.permute(1, 2, 0))) for picture in references]
    prompts = {"ip_adapter_image": images}
    if is_other := (head, no_image) != ("global", "zeros"):
        blank = torch.zeros(1, 3, tiny.REFERENCE_PX, tiny.REFERENCE_PX)
        negative = 0 if no_image == "zeros" else pair.stock.image_encoder(blank).image_embeds
        prompts = {"ip_adapter_image_embeds": []}
        for image in images:
            (embeds,) = pair.stock.prepare_ip_adapter_image_embeds(image, None, "cpu", 1, True)
            embeds[:1] = negative
            prompts["ip_adapter_image_embeds"].append([embeds])
    for guidance in (3.0,) if is_other else (1.0, 3.0):
        options = SamplingOptions(num_steps=3, guidance=guidance, scale=0.6)
        ours = generate(pair.ours, pair.ours.encode_reference(references), TEXTS, SEEDS, options)
        torch.testing.assert_close(ours, stock_pictures(pair.stock, options, **prompts), rtol=0, atol=1e-4)
        by_itself = stock_pictures(pair.stock, options, ip_adapter_image=images)
        assert is_other == bool((ours - by_itself).abs().max() > 0.01) and ours.std() > 0.05
