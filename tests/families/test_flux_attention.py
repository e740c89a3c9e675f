"""InstantX' branches, which diffusers does not read, against their equations; FLUX' image-to-image pipeline.

And the demo's FLUX-class base: stock diffusers draws with its adapter file what we draw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import tiny_flow
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import save_file

from ipa.errors import UserError
from ipa.export.loading import load_into
from ipa.export.published import to_published, write_adapter
from ipa.export.reading import read_adapter
from ipa.families.flux import Flux
from ipa.families.flux_attention import InstantXHost, attend, project, project_out, rotate
from ipa.model import IPAdapterModel
from ipa.prompter import Prompter
from ipa.types import Channel, ImagePrompt


def make_instantx() -> Flux:
    return tiny_flow.make_flux(hosts="all")


@pytest.fixture(scope="module")
def model() -> IPAdapterModel:
    return tiny.shake(tiny_flow.make_model(make_instantx))


@torch.no_grad()
@pytest.mark.parametrize("stack", ["transformer_blocks", "single_transformer_blocks"])
def test_instantx_branches_are_their_equation(stack: str, model: IPAdapterModel) -> None:
    """r = softmax(q RMSNorm(W′_k c)ᵀ / √d) W′_v c, added before the output projection; single streams rotate q."""
    attention = getattr(model.family.transformer, stack)[0].attn
    host, channel = InstantXHost(stack, attention, tiny_flow.T5_WIDTH), Channel()
    branch = host.make_branch()
    branch.to_v_ip.weight.normal_()
    image, tokens = torch.randn(2, 6, 32), torch.randn(2, 3, tiny_flow.T5_WIDTH)
    text = torch.randn(2, 5, 32) if stack == "transformer_blocks" else None
    length = 0 if text is None else 5
    angles = torch.randn(6 + length, 16)
    rotary = (angles.cos(), angles.sin())
    before = attention(image, text, image_rotary_emb=rotary)

    key, value = (layer(tokens).unflatten(-1, (2, 16)) for layer in (branch.to_k_ip, branch.to_v_ip))
    key = key * torch.rsqrt(key.square().mean(-1, keepdim=True) + 1e-5)
    projected = project(attention, image, text)
    rotated = rotate(projected, rotary)
    query = rotated[0] if text is None else projected[0][:, 5:]
    scores = torch.einsum("bqmd,btmd->bmqt", query, key) / 4
    result = torch.einsum("bmqt,btmd->bqmd", scores.softmax(-1), value).flatten(2)
    attended = attend(*rotated, None)
    attended[:, length:] += 0.7 * result
    expected = attended if text is None else project_out(attention, attended, length)

    host.plug(branch, channel)
    with channel.carrying(ImagePrompt(tokens, torch.tensor(0.7))):
        found = attention(image, text, image_rotary_emb=rotary)
    with channel.carrying(ImagePrompt(tokens, torch.tensor(0.0))):
        nothing = attention(image, text, image_rotary_emb=rotary)
    host.unplug()

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(nothing, before, rtol=0, atol=0)


def test_instantx_files_are_recognised_without_metadata(model: IPAdapterModel, tmp_path: Path) -> None:
    tensors = to_published(model.trainable.state_dict(), torch.float32, "instantx")
    write_adapter(tmp_path / "a.safetensors", tensors, model.describe())
    save_file(tensors, tmp_path / "bare.safetensors")
    for path in tmp_path.iterdir():
        read = read_adapter(path)
        assert (read.file.branches, read.file.head, dict(read.file.base_options)) == (
            "instantx",
            "mlp",
            {"hosts": "all"},
        )
        torch.testing.assert_close(read.tensors, tensors, rtol=0, atol=0)
    other = tiny_flow.make_model(make_instantx)
    load_into(other, tmp_path / "bare.safetensors")
    torch.testing.assert_close(other.trainable.state_dict(), model.trainable.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match="tiny has 2 layers of context width 20"):
        load_into(tiny_flow.make_model(tiny_flow.make_flux), tmp_path / "a.safetensors")


def test_single_stream_blocks_have_no_masks(model: IPAdapterModel) -> None:
    family = model.family
    model.adapter.install()
    tokens, mask = torch.randn(1, 6, tiny_flow.T5_WIDTH), torch.ones(1, 4, 4)
    prompt = ImagePrompt(tokens, torch.tensor(1.0), mask_BHW=mask)
    with model.adapter.channel.carrying(prompt), pytest.raises(UserError, match="omit the mask"):
        family.denoise(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), family.encode_text(["a"]))
    model.adapter.remove()


def test_image_to_image_starts_from_its_image() -> None:
    """The pipeline would take given latents in place of the image."""
    model = tiny.shake(tiny_flow.make_model(tiny_flow.make_flux))
    model.adapter.install()
    prompter = Prompter([model], {"num_steps": 2, "guidance": 1.0})
    pipeline = prompter.pipeline(diffusers.FluxImg2ImgPipeline)
    starts = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    made = [
        prompter([starts[0]], "cat", seed=1, pipeline=pipeline, arguments={"image": start, "strength": 0.5})[0]
        for start in (*starts, starts[0])
    ]

    assert made[0].tobytes() == made[2].tobytes() != made[1].tobytes()


DEMO = Path(__file__).resolve().parents[2] / "demo"
BASE, FOLDER, NAME, ENCODER = DEMO / "base_flux", DEMO / "adapters", "flux.safetensors", DEMO / "image_encoder"


def test_the_stock_pipeline_draws_the_same() -> None:
    picture = Image.new("RGB", (64, 64), "teal")
    picture.paste("gold", (16, 8, 40, 50))
    prompter = Prompter.load(FOLDER / NAME, base=str(BASE), device="cpu")
    (ours,) = prompter(picture, "red apple", seed=3, num_steps=4, guidance=3.0)

    stock: Any = FluxPipeline.from_pretrained(BASE)
    stock.set_progress_bar_config(disable=True)
    stock.load_ip_adapter(
        str(FOLDER), subfolder="", weight_name=NAME, image_encoder_pretrained_model_name_or_path=str(ENCODER)
    )
    prompts = {"ip_adapter_image": picture, "negative_ip_adapter_image": Image.new("RGB", (64, 64))}
    sizes = {"width": 64, "height": 64, "max_sequence_length": 16}
    theirs = []
    for scale in (1.0, 0.0):
        stock.set_ip_adapter_scale(scale)
        noise = torch.Generator().manual_seed(3)
        options = {"negative_prompt": "", "true_cfg_scale": 3.0, "num_inference_steps": 4, "generator": noise}
        theirs.append(np.asarray(stock("red apple", **prompts, **sizes, **options).images[0], int))

    assert np.abs(theirs[0] - np.asarray(ours, int)).max() <= 1
    assert np.abs(theirs[1] - theirs[0]).mean() > 5
