from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_prompt_tokens as parts
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipa.errors import UserError
from ipa.evaluation.methods.controlnet_shuffle import ControlNetShuffle, shuffle, smooth_noise
from ipa.evaluation.methods.method import draw_start
from ipa.evaluation.methods.prompt_tokens import Start
from ipa.families.stable_diffusion import StableDiffusion
from ipa.weights import count_parameters

CELL_PX = 8


@pytest.fixture
def method() -> ControlNetShuffle:
    family = tiny.make_family()
    return ControlNetShuffle(family, parts.make_controlnet(family, pooled=True), cell_px=CELL_PX)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_keeps_what_every_method_promises(method: ControlNetShuffle) -> None:
    parts.check_promises(method)


def test_at_scale_0_the_base_speaks_alone(method: ControlNetShuffle) -> None:
    prompts, silent = parts.make_prompts(), replace(parts.FAST, scale=0.0)
    pixels = method.generate(prompts, silent)
    assert torch.equal(pixels, method.generate([parts.other_image(prompt) for prompt in prompts], silent))


def test_the_controlnet_is_as_large_as_in_the_paper() -> None:
    with torch.device("meta"):
        controlnet = ControlNetModel(cross_attention_dim=768, global_pool_conditions=True)
    assert count_parameters(controlnet) == 361_279_120  # 361 M


def test_residuals_are_pooled_and_heard_in_the_conditional_half_alone(method: ControlNetShuffle) -> None:
    heard: list[Tensor] = []

    def watch(module: object, arguments: object, given: dict[str, Tensor]) -> None:
        heard.append(given["mid_block_additional_residual"])

    method.family.unet.register_forward_pre_hook(watch, with_kwargs=True)
    method.generate(parts.make_prompts(), parts.FAST)

    assert len(heard) == parts.FAST.num_steps
    assert all(residual.shape[2:] == (1, 1) for residual in heard)
    assert all(not residual[:3].any() and residual[3:].all() for residual in heard)


def test_a_shuffled_picture_is_made_of_the_whole_picture() -> None:
    """Of pictures whose pixels are their own coordinates every pixel is the flow there: smooth noise from 0 to 1."""
    noise_HW = smooth_noise(64, 32, seeded(0))
    assert noise_HW.shape == (64, 64) and noise_HW.min() == 0 and noise_HW.max() == 1
    assert noise_HW.diff(dim=0).abs().max() < 0.1 and noise_HW.diff(dim=1).abs().max() < 0.1
    x_HW = torch.arange(200, dtype=torch.uint8).expand(100, 200)
    y_HW = torch.arange(100, dtype=torch.uint8)[:, None].expand(100, 200)
    made_3HW = shuffle(torch.stack([x_HW, y_HW, y_HW]), 48, seeded(3), cell_px=24) * 255
    generator = seeded(3)
    for found_HW, side in zip(made_3HW, (200, 100), strict=False):
        torch.testing.assert_close(found_HW, (side - 1) * smooth_noise(48, 24, generator), atol=1e-2, rtol=0)


def test_every_picture_is_shuffled_by_its_own_seed(method: ControlNetShuffle) -> None:
    prompts = [replace(parts.make_prompts()[0], seed=seed) for seed in (5, 5, 6)]
    first, again, other = method.controls(prompts, Start(*draw_start(prompts, (4, 8, 8)), size_px=16))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.1)
    assert first.min() >= 0 and first.max() <= 1


def test_folders_are_read_and_another_kind_of_controlnet_or_less_than_its_weights_is_refused(
    base_folder: Path, tmp_path: Path
) -> None:
    family = StableDiffusion.from_pretrained(str(base_folder))
    with pytest.raises(UserError, match=r"method\.controlnet: this ControlNet does not pool.*control_v11e_sd15_shuff"):
        ControlNetShuffle(family, parts.make_controlnet(family))
    made = parts.make_controlnet(family, pooled=True)
    made.save_pretrained(tmp_path)
    method = ControlNetShuffle.from_pretrained(str(base_folder), str(tmp_path), dtype="float32")
    loaded = method.controlnet.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in made.state_dict().items())
    assert method.trained == count_parameters(made)
    with pytest.raises(UserError, match=r"method\.dtype=float8: give float32"):
        ControlNetShuffle.from_pretrained(str(base_folder), str(tmp_path), dtype="float8")

    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "conv_in.bias"}, file)
    with pytest.raises(UserError, match=rf"method\.controlnet={tmp_path}: 1 weights are missing, conv_in\.bias"):
        ControlNetShuffle.from_pretrained("base", str(tmp_path))
