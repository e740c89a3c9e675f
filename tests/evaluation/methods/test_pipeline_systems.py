"""The systems that diffusers has a pipeline for: what all promise, and what is each one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as made
import tiny_prompt_tokens as parts
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models import DualTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_pipelines import SYSTEMS
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from ipa.errors import MissingWeights, UserError
from ipa.evaluation.methods.pipelines import to_pil
from ipa.evaluation.methods.sd_unclip import SDUnCLIP
from ipa.evaluation.methods.sd_variations import squeeze
from ipa.weights import count_parameters

PROMPTS = parts.make_prompts()
SD15 = {"cross_attention_dim": 768, "sample_size": 64}


def load(name: str, folder: Path, **options: Any) -> Any:
    """From folders that are named like their options."""
    system = SYSTEMS[name]
    paths = {option: str(folder / option) for option in system.folders}
    return system.method.from_pretrained(**paths, **{"dtype": "float32", **system.options, **options})


def save(name: str, folder: Path) -> dict[str, made.Parts]:
    weights = SYSTEMS[name].make_parts()
    for option, own in weights.items():
        made.save_parts(folder / option, own)
    return weights


@pytest.mark.parametrize("name", SYSTEMS)
def test_they_keep_what_every_method_promises(name: str) -> None:
    method = SYSTEMS[name].make()
    pixels = parts.check_promises(method)
    if name == "open_unclip":
        with pytest.raises(UserError, match=r"method\.dtype=float16: on a CPU open_unclip needs float32"):
            method.to(torch.float16).generate(PROMPTS, parts.FAST)
        return
    half = method.to(torch.float16).generate(PROMPTS, parts.FAST)
    assert half.dtype == torch.float32 and (half - pixels).abs().mean() < 0.01


@pytest.mark.parametrize("name", SYSTEMS)
def test_folders_are_read(name: str, tmp_path: Path) -> None:
    """With every weight and every scheduler: the images are those of the saved parts."""
    weights = save(name, tmp_path)
    method = load(name, tmp_path)
    expected = SYSTEMS[name].make(weights)
    assert torch.equal(method.generate(PROMPTS, parts.FAST), expected.generate(PROMPTS, parts.FAST))
    assert str(tmp_path / "path") in method.source and method.trained == expected.trained
    assert next(load(name, tmp_path, dtype="float16").parameters()).dtype == torch.float16


def full_karlo() -> made.Parts:
    widths = {"block_out_channels": (320, 640, 960, 1280), "cross_attention_dim": 1536}
    projection = made.full_size(made.KarloProjection, time_embed_dim=4 * 320, cross_attention_dim=1536)
    return {"decoder": made.full_unclip_decoder(**made.KARLO, **widths), "text_proj": projection}


def full_kandinsky() -> made.Parts:
    widths = {"block_out_channels": (384, 768, 1152, 1536), "cross_attention_dim": 768, "encoder_hid_dim": 1024}
    return {"unet": made.full_unclip_decoder(**made.KANDINSKY, **widths)}


def full_unclip() -> made.Parts:
    widths = {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]}
    embedding = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * 1024}
    return {"unet": made.full_size(UNet2DConditionModel, use_linear_projection=True, **widths, **embedding)}


@pytest.mark.parametrize(
    ("name", "make", "count"),
    [
        ("sd_unclip", full_unclip, 870_173_124),
        ("sd_image_variations", lambda: {"unet": made.full_size(UNet2DConditionModel, **SD15)}, 859_520_964),
        ("open_unclip", full_karlo, 893_318_086),
        ("kandinsky21", full_kandinsky, 1_228_661_768),
        ("versatile", lambda: {"image_unet": made.full_size(UNet2DConditionModel, **SD15)}, 859_520_964),
    ],
)
def test_they_are_as_large_as_in_the_paper(name: str, make: Callable[[], made.Parts], count: int) -> None:
    assert SYSTEMS[name].make(**make()).trained == count


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    """A whole part, a weight, a vocabulary; a broken file; a scheduler that diffusers does not have."""
    weights, folder = save("sd_unclip", tmp_path)["path"], tmp_path / "path"
    (folder / "vae").rename(tmp_path / "vae")
    assert "has no vae/" in parts.check_missing(SDUnCLIP.from_pretrained, "path", path=str(folder))
    (tmp_path / "vae").rename(folder / "vae")

    file = folder / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["decoder.conv_in.bias"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(MissingWeights, match=rf"method\.path={folder} lacks 1 weights of vae/, decoder\.conv_in\.bias"):
        load("sd_unclip", tmp_path)
    for spoil in (lambda: file.write_bytes(b"nothing"), file.unlink):
        spoil()
        with pytest.raises(UserError, match=rf"method\.path={folder} cannot be read in vae/"):
            load("sd_unclip", tmp_path)
    weights["vae"].save_pretrained(folder / "vae")

    vocabulary = folder / "tokenizer/tokenizer.json"
    vocabulary.rename(tmp_path / "tokenizer.json")
    with pytest.raises(MissingWeights, match=r"has none of tokenizer\.json, vocab\.json.* in tokenizer/"):
        load("sd_unclip", tmp_path)
    (tmp_path / "tokenizer.json").rename(vocabulary)
    configuration = folder / "scheduler/scheduler_config.json"
    configuration.write_text(json.dumps(json.loads(configuration.read_text()) | {"_class_name": "os"}))
    with pytest.raises(UserError, match="scheduler/ names os"):
        load("sd_unclip", tmp_path)
    with pytest.raises(UserError, match=r"method\.dtype=half-ish: give float32"):
        load("sd_unclip", tmp_path, dtype="half-ish")

    kandinsky, prior = SYSTEMS["kandinsky21"].method.from_pretrained, str(tmp_path / "prior")
    made.save_parts(tmp_path / "prior", made.prior_parts())
    parts.check_missing(kandinsky, "path", path="some/decoder", prior_path=prior)
    (tmp_path / "prior/prior/config.json").unlink()
    parts.check_missing(kandinsky, "prior_path", path="x/y", prior_path=prior)


def test_unclips_embedding_is_noised_with_other_numbers_than_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    method, drawn = SYSTEMS["sd_unclip"].make(), []
    assert method.pipeline.scheduler.config.prediction_type == "v_prediction"
    add_noise = method.pipeline.image_noising_scheduler.add_noise

    def watch(embeds: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        drawn.append(noise)
        return add_noise(embeds, noise, timesteps)

    monkeypatch.setattr(method.pipeline.image_noising_scheduler, "add_noise", watch)
    method.generate(PROMPTS, replace(parts.FAST, num_steps=1))

    starts = torch.stack([torch.randn(4 * 8 * 8, generator=torch.Generator().manual_seed(p.seed)) for p in PROMPTS])
    assert drawn[0].shape == (3, made.UNCLIP_WIDTH)
    assert not torch.isin(drawn[0], starts).any()


def test_variations_use_ddim_clip_no_latents_and_squeeze_pictures_as_the_card_has_it() -> None:
    weights = SYSTEMS["sd_image_variations"].make_parts()
    scheduler = SYSTEMS["sd_image_variations"].make(weights).pipeline.scheduler
    assert isinstance(scheduler, DDIMScheduler) and not scheduler.config.clip_sample
    theirs = weights["path"]["scheduler"].alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod, theirs, rtol=0, atol=0)
    image_3HW = PROMPTS[0].image_3HW
    rough, smooth = (
        resize(image_3HW / 255, [16, 16], InterpolationMode.BICUBIC, antialias=antialias) for antialias in (False, True)
    )
    torch.testing.assert_close(squeeze(image_3HW, 16), rough)
    assert (squeeze(image_3HW, 16) - smooth).abs().mean() > 0.05


def test_sizes_that_a_system_cannot_make_are_refused() -> None:
    karlo, kandinsky = (SYSTEMS[name].make() for name in ("open_unclip", "kandinsky21"))
    karlo.generate(PROMPTS, replace(parts.FAST, image_size_px=16))
    with pytest.raises(UserError, match=r"image_size_px=32: open_unclip makes images of 16 px only"):
        karlo.generate(PROMPTS, replace(parts.FAST, image_size_px=32))
    assert kandinsky.generate(PROMPTS, replace(parts.FAST, image_size_px=20)).shape == (3, 3, 20, 20)
    with pytest.raises(UserError, match=r"image_size_px=18: kandinsky21 needs a multiple of 4"):
        kandinsky.generate(PROMPTS, replace(parts.FAST, image_size_px=18))


def test_kandinskys_embeddings_are_those_of_the_priors_interpolation() -> None:
    """An empty text leaves the image alone. The decoder keeps its checkpoint's sampler."""
    method = SYSTEMS["kandinsky21"].make()
    assert isinstance(method.decoder.scheduler, DDPMScheduler)
    found_BE = method.embeddings(PROMPTS, [torch.Generator().manual_seed(prompt.seed) for prompt in PROMPTS])
    for embedding_E, prompt, picture in zip(found_BE, PROMPTS, to_pil(PROMPTS), strict=True):
        theirs = method.prior.interpolate(
            [picture, prompt.text] if prompt.text else [picture],
            [0.5, 0.5] if prompt.text else [1.0],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(prompt.seed),
        )
        torch.testing.assert_close(embedding_E, theirs.image_embeds[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(method.prior.get_zero_embed(1), theirs.negative_image_embeds)


def test_without_text_dual_guidance_is_image_variation_and_the_library_stays_as_it_is() -> None:
    """Of its parameters only those of the image flow count."""
    weights, before = SYSTEMS["versatile"].make_parts(), DualTransformer2DModel.forward
    image_flow = count_parameters(weights["path"]["image_unet"])
    expected = SYSTEMS["versatile"].make(weights).generate(PROMPTS, parts.FAST)
    method = SYSTEMS["versatile_dual"].make(weights, text_weight=0.0)
    torch.testing.assert_close(method.generate(PROMPTS, parts.FAST), expected, atol=1e-4, rtol=0)
    assert method.trained == image_flow < count_parameters(method.unet)
    assert DualTransformer2DModel.forward is before
    assert all(len(layer._forward_pre_hooks) == 1 for layer in method.dual_layers())
    assert not DualTransformer2DModel(2, 8, 8, norm_num_groups=4)._forward_pre_hooks


def test_versatiles_no_image_is_grey() -> None:
    seen: list[Tensor] = []
    for name in ("versatile", "versatile_dual"):
        method = SYSTEMS[name].make()
        method.pipeline.image_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        method.generate(PROMPTS, parts.FAST)

    processor = made.make_processor()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    grey = [pixels for pixels in seen if (pixels.amax((2, 3)) == pixels.amin((2, 3))).all()]
    assert len(seen) == 4 and len(grey) == 2
    torch.testing.assert_close(grey[0] * std + mean, torch.full((3, 3, 16, 16), 128 / 255))
    assert torch.equal(grey[0], grey[1])
