from pathlib import Path

import tiny
import tiny_pipelines as made
import tiny_prompt_tokens as parts
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, VersatileDiffusionImageVariationPipeline
from diffusers.models import DualTransformer2DModel
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ipa.evaluation.methods.method import count_parameters
from ipa.evaluation.methods.pipelines import read_classes
from ipa.evaluation.methods.versatile import DualGuidedPipeline, Versatile, VersatileDual

TextUNet = read_classes(DualGuidedPipeline)["text_unet"]
IMAGE_PARTS = read_classes(VersatileDiffusionImageVariationPipeline)


def make_vision() -> CLIPVisionModelWithProjection:
    """257 tokens, as diffusers has it written."""
    config = CLIPVisionConfig(
        hidden_size=parts.VISION_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=1,
        projection_dim=tiny.CONTEXT_WIDTH,
    )
    return parts.loud(CLIPVisionModelWithProjection(config))


def make_text_unet() -> torch.nn.Module:
    unet = TextUNet(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockFlat", "DownBlockFlat"),
        up_block_types=("UpBlockFlat", "CrossAttnUpBlockFlat"),
        layers_per_block=1,
        cross_attention_dim=tiny.CONTEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    for name, module in unet.named_modules():
        if name.endswith(("to_v", "to_out.0")):
            parts.loud(module)
    return unet


def make_parts() -> dict[str, object]:
    """All of the published folder."""
    return {
        "tokenizer": tiny.make_tokenizer(),
        "image_feature_extractor": made.make_processor(),
        "text_encoder": made.make_text_encoder(),
        "image_encoder": make_vision(),
        "image_unet": made.make_unet(),
        "text_unet": make_text_unet(),
        "vae": tiny.make_vae(),
        "scheduler": DDIMScheduler(**tiny.SCHEDULE),
    }


def make_method(**others: object) -> Versatile:
    made_parts = {**{name: part for name, part in make_parts().items() if name in IMAGE_PARTS}, **others}
    return Versatile(VersatileDiffusionImageVariationPipeline(**made_parts))


def make_dual(text_weight: float = 0.5, **others: object) -> VersatileDual:
    return VersatileDual(DualGuidedPipeline(**{**make_parts(), **others}), text_weight=text_weight)


def test_image_variation_keeps_what_every_method_promises() -> None:
    method = make_method()
    parts.check_promises(method)
    parts.check_without_guidance(method)
    made.check_half_precision(method)


def test_dual_guidance_keeps_what_every_method_promises() -> None:
    method = make_dual()
    parts.check_promises(method)
    parts.check_without_guidance(method)
    made.check_half_precision(method)


def test_without_text_dual_guidance_is_image_variation() -> None:
    weights, prompts = make_parts(), parts.make_prompts()
    shared = {name: part for name, part in weights.items() if name in IMAGE_PARTS}
    expected = make_method(**shared).generate(prompts, parts.FAST)
    torch.testing.assert_close(make_dual(0.0, **weights).generate(prompts, parts.FAST), expected, atol=1e-4, rtol=0)


def test_no_image_is_grey() -> None:
    seen: list[Tensor] = []
    for method in (make_method(), make_dual()):
        method.pipeline.image_encoder.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0]), with_kwargs=False
        )
        method.generate(parts.make_prompts(), parts.FAST)

    processor = made.make_processor()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    grey = [pixels for pixels in seen if (pixels.amax((2, 3)) == pixels.amin((2, 3))).all()]
    assert len(seen) == 4 and len(grey) == 2
    torch.testing.assert_close(grey[0] * std + mean, torch.full((3, 3, 16, 16), 128 / 255))
    assert torch.equal(grey[0], grey[1])


def test_the_library_itself_is_left_as_it_is() -> None:
    before = DualTransformer2DModel.forward
    method = make_dual()
    assert DualTransformer2DModel.forward is before
    assert all(len(layer._forward_pre_hooks) == 1 for layer in method.dual_layers())
    assert not DualTransformer2DModel(2, 8, 8, norm_num_groups=4)._forward_pre_hooks


def test_the_image_flow_is_as_large_as_in_the_paper() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    assert make_method(image_unet=unet).trained == 859_520_964  # 860 M


def test_of_the_dual_flow_only_the_images_counts() -> None:
    weights = make_parts()
    image_flow = count_parameters(weights["image_unet"])
    method = make_dual(**weights)
    assert method.trained == image_flow < count_parameters(method.unet)


def test_one_folder_serves_both(tmp_path: Path) -> None:
    weights = make_parts()
    made.save_parts(tmp_path, **weights)
    variation = Versatile.from_pretrained(str(tmp_path), dtype="float32")
    made.check_loaded(variation, weights["image_unet"], weights["vae"], weights["image_encoder"])
    dual = VersatileDual.from_pretrained(str(tmp_path), dtype="float32", text_weight=0.3)
    prompts = parts.make_prompts()
    expected = make_dual(0.3, **weights).generate(prompts, parts.FAST)
    assert torch.equal(dual.generate(prompts, parts.FAST), expected)
