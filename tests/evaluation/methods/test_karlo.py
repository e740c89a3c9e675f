from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_pipelines as made
import tiny_prompt_tokens as parts
import torch
from diffusers import UnCLIPImageVariationPipeline, UnCLIPScheduler, UNet2DModel

from ipa.evaluation.methods.karlo import OpenUnCLIP
from ipa.evaluation.methods.pipelines import read_classes

EMBEDDING_WIDTH = tiny.CONTEXT_WIDTH  # as wide as the text states
CROSS_WIDTH = 20
TextProjection = read_classes(UnCLIPImageVariationPipeline)["text_proj"]
DECODER = {"class_embed_type": "identity", "in_channels": 3, "out_channels": 6}


def make_super_res() -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        add_attention=False,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )


def make_parts() -> dict[str, object]:
    projection = TextProjection(
        clip_embeddings_dim=EMBEDDING_WIDTH, time_embed_dim=4 * 8, cross_attention_dim=CROSS_WIDTH
    )
    return {
        "decoder": made.make_unclip_decoder(**DECODER, cross_attention_dim=CROSS_WIDTH),
        "text_encoder": made.make_text_encoder(EMBEDDING_WIDTH),
        "tokenizer": tiny.make_tokenizer(),
        "text_proj": parts.loud(projection),
        "feature_extractor": made.make_processor(),
        "image_encoder": parts.loud(parts.make_vision(EMBEDDING_WIDTH)),
        "super_res_first": make_super_res(),
        "super_res_last": make_super_res(),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log"),
    }


def make_method(**others: object) -> OpenUnCLIP:
    return OpenUnCLIP(UnCLIPImageVariationPipeline(**{**make_parts(), **others}), super_res_steps=2)


def test_it_keeps_what_every_method_promises() -> None:
    method = make_method()
    parts.check_promises(method)
    parts.check_without_guidance(method)


def test_the_decoder_is_as_large_as_in_the_paper() -> None:
    widths = {"block_out_channels": (320, 640, 960, 1280), "cross_attention_dim": 1536}
    decoder = made.make_full_unclip_decoder(**DECODER, **widths)
    with torch.device("meta"):
        projection = TextProjection(time_embed_dim=4 * 320, cross_attention_dim=1536)
    assert make_method(decoder=decoder, text_proj=projection).trained == 893_318_086  # 893 M


def test_pictures_have_one_size() -> None:
    method = make_method()
    method.generate(parts.make_prompts(), replace(parts.FAST, image_size_px=16))
    with pytest.raises(ValueError, match=r"image_size_px=32: open_unclip makes images of 16 px only"):
        method.generate(parts.make_prompts(), replace(parts.FAST, image_size_px=32))


def test_half_precision_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.dtype=float16: on a CPU open_unclip needs float32"):
        make_method().to(torch.float16).generate(parts.make_prompts(), parts.FAST)


def test_folders_are_read(tmp_path: Path) -> None:
    weights = make_parts()
    made.save_parts(tmp_path, **weights)
    method = OpenUnCLIP.from_pretrained(str(tmp_path), dtype="float32", super_res_steps=2)
    made.check_loaded(method, *(weights[name] for name in ("decoder", "text_proj", "text_encoder", "image_encoder")))
    assert method.pipeline.decoder_scheduler.config.variance_type == "learned_range"
    assert method.pipeline.super_res_scheduler.config.variance_type == "fixed_small_log"
    prompts = parts.make_prompts()
    assert torch.equal(method.generate(prompts, parts.FAST), make_method(**weights).generate(prompts, parts.FAST))


def test_a_scheduler_that_diffusers_does_not_have_is_named(tmp_path: Path) -> None:
    made.save_parts(tmp_path, **make_parts())
    made.name_scheduler(tmp_path / "decoder_scheduler", "os")
    with pytest.raises(ValueError, match=r"decoder_scheduler/ names os"):
        OpenUnCLIP.from_pretrained(str(tmp_path))
