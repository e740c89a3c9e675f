"""Adapter files for transformers: diffusers' own loaders and ours give the same predictions and the same images."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flow
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipa.errors import UserError
from ipa.export.loading import load_into
from ipa.export.published import from_published, to_published, write_adapter
from ipa.export.reading import read_adapter
from ipa.families.flux import image_ids
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, draw_noise, generate
from ipa.types import Features, TextCondition

NAME = "adapter.safetensors"


def write(model: IPAdapterModel, path: Path) -> dict[str, Tensor]:
    """Export in fp32; returns the canonical tensors."""
    tensors = to_published(model.trainable.state_dict(), torch.float32, model.family.branches)
    write_adapter(path, tensors, model.describe())
    return tensors


def load_stock(family: Any, folder: Path) -> Any:
    """The public pipeline around the family, with the file loaded by diffusers, and no image encoder."""
    pipeline = family.pipeline()
    option = "image_encoder_folder" if family.branches == "sd3" else "image_encoder_pretrained_model_name_or_path"
    pipeline.load_ip_adapter(str(folder), subfolder="", weight_name=NAME, **{option: None})
    return pipeline


class Pair:
    """Our model and a stock pipeline on a base of its own with equal weights, both after reading one file."""

    def __init__(self, name: str, folder: Path) -> None:
        make = tiny_flow.MAKERS[name]
        self.file = folder / NAME
        self.tensors = write(tiny.shake(tiny_flow.make_model(make)), self.file)
        self.ours = tiny_flow.make_model(make)
        load_into(self.ours, self.file)
        self.ours.adapter.install()
        self.stock = load_stock(make(), folder)

    def stock_prediction(
        self, noisy: Tensor, time_B: Tensor, text: TextCondition, images: list[Features], scale: float
    ) -> Tensor:
        self.stock.set_ip_adapter_scale(scale)
        family, transformer = self.ours.family, self.stock.transformer
        if family.branches == "sd3":
            kwargs = {"ip_adapter_image_embeds": images[0].patches_BPF}
            pooled = {"pooled_projections": text.pooled_BE, "joint_attention_kwargs": kwargs}
            return transformer(noisy, text.states_BLD, timestep=time_B, **pooled).sample
        embeds = torch.stack([image.pooled_BE for image in images if image.pooled_BE is not None], dim=1)
        packed = family.pack(noisy)
        velocity = transformer(
            packed,
            text.states_BLD,
            timestep=time_B,
            img_ids=image_ids(4, 4).float(),
            txt_ids=torch.zeros(text.states_BLD.shape[1], 3),
            joint_attention_kwargs={"ip_adapter_image_embeds": [embeds]},
            **family.conditions(text, packed),
        ).sample
        return family.unpack(velocity, tuple(noisy.shape[1:]))


@pytest.fixture(scope="module", params=list(tiny_flow.MAKERS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def make_images(model: IPAdapterModel, number: int) -> list[Features]:
    return [model.encode_reference(tiny.make_pictures(2, tiny.REFERENCE_PX, seed)) for seed in range(number)]


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.5])
@pytest.mark.parametrize("number", [1, 2])
def test_predictions_are_those_of_diffusers(pair: Pair, scale: float, number: int) -> None:
    """A reference for each item of the batch, and for FLUX two of them; λ = 0 is the base to the bit."""
    family = pair.ours.family
    if family.branches == "sd3" and number > 1:
        pytest.skip("diffusers' head for Stable Diffusion 3 takes one image")
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    time_B, text = torch.tensor([0.9, 0.2]) * family.time_factor, family.encode_text(["cat", "a red dog"])
    images = make_images(pair.ours, number)

    tokens = pair.ours.image_tokens(*images, t_B=time_B)
    ours = pair.ours.predict(noisy, time_B, text, tokens, scale)
    base = family.denoise(noisy, time_B, text)

    torch.testing.assert_close(ours, pair.stock_prediction(noisy, time_B, text, images, scale), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, base) == (scale == 0)


def test_import_export_import_keeps_the_tensors(pair: Pair, tmp_path: Path) -> None:
    """Also through a .bin, which has no metadata, and as a file without metadata."""
    read = read_adapter(pair.file)
    assert read.file.branches == pair.ours.family.branches
    torch.testing.assert_close(read.tensors, pair.tensors, rtol=0, atol=0)
    write(pair.ours, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == pair.file.read_bytes()
    save_file(load_file(pair.file), tmp_path / "bare.safetensors")
    for path in (tmp_path / "bare.safetensors", tmp_path / "plain.bin", tmp_path / "plain.safetensors"):
        if path.stem == "plain":
            write(pair.ours, path) if path.suffix == ".bin" else save_file(pair.tensors, path)
        again = read_adapter(path)
        assert (again.file.branches, again.file.head) == (read.file.branches, read.file.head)
        torch.testing.assert_close(again.tensors, pair.tensors, rtol=0, atol=0)
    state = from_published(read.tensors, branches=read.file.branches)
    torch.testing.assert_close(state, dict(pair.ours.trainable.state_dict()), rtol=0, atol=0)


@torch.no_grad()
def test_images_are_those_of_the_stock_pipelines(pair: Pair) -> None:
    """One image at a time, since the stock pipelines mix or refuse references of a batch; ours does two at once."""
    model, family = pair.ours, pair.ours.family
    (image,), options = make_images(model, 1), SamplingOptions(num_steps=2, guidance=3.0)
    texts, seeds = ["cat", "a red dog"], [3, 4]
    ours = generate(model, image, texts, seeds, options)
    pair.stock.set_ip_adapter_scale(1.0)
    for row, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
        positive, negative = family.encode_text([text]), family.encode_text([""])
        found, empty = image.map(lambda x, row=row: x[row : row + 1]), model.no_image(1)
        if family.branches == "sd3":
            embeds = {"ip_adapter_image_embeds": torch.cat([empty.patches_BPF, found.patches_BPF])}
        else:
            embeds = {
                "ip_adapter_image_embeds": [found.pooled_BE[:, None]],
                "negative_ip_adapter_image_embeds": [empty.pooled_BE[:, None]],
            }
        latents = pair.stock(
            **family.prompt_arguments(positive, negative),
            **family.guidance_arguments(3.0),
            **embeds,
            latents=family.pack(draw_noise((4, 8, 8), [seed])),
            num_inference_steps=2,
            height=tiny.IMAGE_PX,
            width=tiny.IMAGE_PX,
            output_type="latent",
        ).images
        theirs = family.decode_latents(family.unpack(latents, (4, 8, 8)))
        torch.testing.assert_close(ours[row : row + 1], theirs, rtol=1e-4, atol=1e-4)


def test_flux_is_written_under_xlabs_names(tmp_path: Path) -> None:
    write(tiny_flow.make_model(tiny_flow.make_flux), tmp_path / NAME)
    names = load_file(tmp_path / NAME).keys()

    assert "ip_adapter_proj_model.proj.weight" in names
    assert "double_blocks.1.processor.ip_adapter_double_stream_k_proj.bias" in names
    assert all(name.startswith(("ip_adapter_proj_model.", "double_blocks.")) for name in names)


def test_diffusers_names_of_the_time_aware_head_are_read(tmp_path: Path) -> None:
    model = tiny_flow.make_model(tiny_flow.make_sd3)
    expected = write(model, tmp_path / NAME)
    stock = load_stock(tiny_flow.make_sd3(), tmp_path)
    theirs = {f"image_proj.{name}": value for name, value in stock.transformer.image_proj.state_dict().items()}
    theirs |= {name: value for name, value in expected.items() if name.startswith("ip_adapter.")}
    save_file(theirs, tmp_path / "theirs.safetensors")

    torch.testing.assert_close(read_adapter(tmp_path / "theirs.safetensors").tensors, expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def models() -> dict[str, IPAdapterModel]:
    made = {name: tiny_flow.make_model(make) for name, make in tiny_flow.MAKERS.items()}
    return made | {"unet": tiny.make_model()}


@pytest.mark.parametrize("file", ["flux", "sd3", "sd35_medium", "unet"])
def test_a_file_on_another_base_is_refused(file: str, models: dict[str, IPAdapterModel], tmp_path: Path) -> None:
    """But for those of FLUX, Schnell and Chroma, which are of one size."""
    write(models[file], tmp_path / NAME)
    for base in models.keys() - {file}:
        if {file, base} <= {"flux", "schnell", "chroma"}:
            load_into(models[base], tmp_path / NAME)
            continue
        words = r".*whose branches are others" if "unet" in (file, base) else ""
        with pytest.raises(UserError, match=rf"does not fit: the base tiny has \d+ layers{words}"):
            load_into(models[base], tmp_path / NAME)
