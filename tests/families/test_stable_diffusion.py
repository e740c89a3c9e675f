"""The frozen base: what it is called with and gives, and how it is loaded."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_sdxl
import torch
from diffusers import DDIMScheduler
from torch import nn

from ipa.errors import UserError
from ipa.families.sources import check_pipeline_folder
from ipa.families.stable_diffusion import StableDiffusion
from ipa.types import to_uint8, to_unit_range
from ipa.weights import hash_weights


@pytest.fixture
def family() -> StableDiffusion:
    return tiny.make_family()


def test_latents_are_encoded_to_a_scale_and_decoded_from_it(family: StableDiffusion) -> None:
    pixels = to_unit_range(tiny.make_pictures(2, tiny.IMAGE_PX))
    noise = torch.randn(2, *family.latent_shape(tiny.IMAGE_PX))
    with torch.no_grad():
        raw = family.vae.encode(pixels).latent_dist
    posterior = family.encode_pixels(pixels)

    torch.testing.assert_close(posterior.sample(noise), 0.3 * (raw.mean + raw.std * noise), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.mean_BCHW, 0.3 * raw.mean)
    assert not posterior.mean_BCHW.requires_grad and posterior.mean_BCHW.shape == noise.shape == (2, 4, 8, 8)
    with torch.no_grad():
        expected = family.vae.decode(posterior.mean_BCHW / 0.3).sample.clamp(-1, 1)
    assert torch.equal(family.decode_latents(posterior.mean_BCHW), expected)
    pixels = family.decode_latents(100 * noise)
    assert pixels.dtype == torch.float32 and (pixels.min(), pixels.max()) == (-1, 1)
    assert to_uint8(pixels).unique().numel() > 2


@pytest.mark.parametrize(
    ("make", "kind"),
    [*((tiny.make_family, kind) for kind in tiny.KINDS), (tiny_sdxl.make_family, ("v_prediction", True))],
)
def test_schedule_and_prediction_type_are_the_checkpoints_own(make: Any, kind: tuple[str, bool]) -> None:
    """Also where the checkpoint's sampler is another than DDIM, as Stable Diffusion XL's is."""
    family = make(*kind)
    sampler = family.pipeline().scheduler

    assert isinstance(sampler, DDIMScheduler) and not sampler.config.clip_sample
    assert (family.prediction_type, bool(family.alphas_cumprod[-1] == 0)) == kind
    assert sampler.config.prediction_type == family.prediction_type
    assert torch.equal(family.alphas_cumprod, sampler.alphas_cumprod)
    torch.testing.assert_close(family.alphas_cumprod, family.scheduler.alphas_cumprod)


def test_the_text_is_encoded_as_the_public_pipeline_does(family: StableDiffusion) -> None:
    """Cut and padded to the tokenizer's length."""
    texts = ["cat", "a much longer text than fits"]
    theirs, negative = tiny.make_pipeline(family).encode_prompt(texts, "cpu", 1, True)

    assert theirs.shape == (2, tiny.TEXT_LENGTH, tiny.CONTEXT_WIDTH)
    torch.testing.assert_close(family.encode_text(texts).states_BLD, theirs)
    torch.testing.assert_close(family.encode_text(["cat"]).states_BLD, theirs[:1])
    torch.testing.assert_close(family.encode_text(["", ""]).states_BLD, negative)


def test_a_saved_folder_is_loaded_with_the_same_weights_laid_out_for_their_kernels(base_folder: Path) -> None:
    loaded, made = StableDiffusion.from_pretrained(str(base_folder)), tiny.make_family("v_prediction", zero_snr=True)
    plain = StableDiffusion.from_pretrained(str(base_folder), channels_last=False)
    kernels = [m.weight for part in (loaded.unet, loaded.vae) for m in part.modules() if isinstance(m, nn.Conv2d)]
    latents, t_B = torch.randn(2, 4, 8, 8), torch.tensor([7, 500])
    text = plain.encode_text(["cat", "a dog"])

    assert (loaded.source, loaded.prediction_type) == (str(base_folder), "v_prediction")
    state = loaded.state_dict()
    assert state.keys() == made.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert plain.unet.conv_in.weight.is_contiguous() and not loaded.unet.conv_in.weight.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(loaded.denoise(latents, t_B, text), plain.denoise(latents, t_B, text))
    assert hash_weights(loaded) == hash_weights(plain)


def test_weights_are_loaded_in_the_type_asked_for(base_folder: Path) -> None:
    family = StableDiffusion.from_pretrained(str(base_folder), dtype="bfloat16")
    latents = torch.randn(2, 4, 8, 8)
    prediction = family.denoise(latents, torch.tensor([1, 2]), family.encode_text(["a", "b"]))

    assert {parameter.dtype for parameter in family.parameters()} == {torch.bfloat16}
    assert prediction.dtype == torch.bfloat16
    assert family.encode_pixels(torch.zeros(1, 3, 16, 16)).mean_BCHW.dtype == torch.float32
    assert family.decode_latents(latents).dtype == torch.float32


def test_a_folder_that_is_not_there_or_something_else_is_named(tmp_path: Path) -> None:
    for path in ("./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "~/base", "tests/nowhere"):
        with pytest.raises(UserError, match=rf"base\.path={path}: no such folder.*hub id owner/name"):
            StableDiffusion.from_pretrained(path)
    with pytest.raises(UserError, match=rf"base\.path={tmp_path} has no model_index\.json"):
        StableDiffusion.from_pretrained(str(tmp_path))
    check_pipeline_folder("stable-diffusion-v1-5/stable-diffusion-v1-5")  # a hub id
