from pathlib import Path

import pytest
import tiny
import tiny_pipelines as made
import tiny_prompt_tokens as parts
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionImageVariationPipeline, UNet2DConditionModel
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from ipa.evaluation.methods.sd_variations import SDImageVariations, squeeze


def make_parts() -> dict[str, object]:
    return {
        "vae": tiny.make_vae(),
        "image_encoder": parts.loud(parts.make_vision()),
        "unet": made.make_unet(),
        "scheduler": PNDMScheduler(**tiny.SCHEDULE, skip_prk_steps=True, steps_offset=1),
        "feature_extractor": made.make_processor(),
    }


def make_method(**others: object) -> SDImageVariations:
    absent = {"safety_checker": None, "requires_safety_checker": False}
    return SDImageVariations(StableDiffusionImageVariationPipeline(**{**make_parts(), **absent, **others}))


def test_it_keeps_what_every_method_promises() -> None:
    method = make_method()
    parts.check_promises(method)
    parts.check_without_guidance(method)
    made.check_half_precision(method)


def test_it_samples_with_ddim_on_the_checkpoints_schedule_and_clips_no_latents() -> None:
    scheduler = make_method().pipeline.scheduler
    assert isinstance(scheduler, DDIMScheduler) and not scheduler.config.clip_sample
    torch.testing.assert_close(scheduler.alphas_cumprod, make_parts()["scheduler"].alphas_cumprod, rtol=0, atol=0)


def test_the_unet_is_as_large_as_in_the_paper() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)  # of Stable Diffusion 1.4
    assert made.in_millions(unet) == 860
    assert make_method(unet=unet).trained == 859_520_964


def test_pictures_are_squeezed_as_the_card_has_it() -> None:
    image_3HW = tiny.make_pictures(1, 50)[0, :, :30]
    theirs = resize(image_3HW / 255, [16, 16], InterpolationMode.BICUBIC, antialias=False)
    torch.testing.assert_close(squeeze(image_3HW, 16), theirs)
    smooth = resize(image_3HW / 255, [16, 16], InterpolationMode.BICUBIC, antialias=True)
    assert (squeeze(image_3HW, 16) - smooth).abs().mean() > 0.1


def test_folders_are_read(tmp_path: Path) -> None:
    weights = make_parts()
    made.save_parts(tmp_path, **weights)
    method = SDImageVariations.from_pretrained(str(tmp_path), dtype="float32")
    made.check_loaded(method, weights["unet"], weights["vae"], weights["image_encoder"])
    assert method.source == str(tmp_path) and method.trained == sum(x.numel() for x in weights["unet"].parameters())
    assert next(SDImageVariations.from_pretrained(str(tmp_path)).parameters()).dtype == torch.float16


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    def load() -> None:
        SDImageVariations.from_pretrained(str(tmp_path), dtype="float32")

    weights = make_parts()
    made.save_parts(tmp_path, **{name: part for name, part in weights.items() if name != "vae"})
    parts.check_missing(load, "path", pytest.MonkeyPatch())
    made.save_parts(tmp_path, vae=weights["vae"])
    made.check_incomplete(load, tmp_path, "vae", "decoder.conv_in.bias")
    with pytest.raises(ValueError, match=r"method\.dtype=half-ish: give float32"):
        SDImageVariations.from_pretrained(str(tmp_path), dtype="half-ish")
