from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_pipelines as made
import tiny_prompt_tokens as parts
import torch
from diffusers import DDPMScheduler, PNDMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

from ipa.evaluation.methods.sd_unclip import HUB_ID, SDUnCLIP

EMBEDDING_WIDTH = 12


def make_parts() -> dict[str, object]:
    return {
        "feature_extractor": made.make_processor(),
        "image_encoder": parts.loud(parts.make_vision(EMBEDDING_WIDTH)),
        "image_normalizer": StableUnCLIPImageNormalizer(EMBEDDING_WIDTH),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "tokenizer": tiny.make_tokenizer(),
        "text_encoder": tiny.make_text_encoder(),
        "unet": made.make_unet(
            class_embed_type="projection", projection_class_embeddings_input_dim=2 * EMBEDDING_WIDTH
        ),
        "scheduler": PNDMScheduler(
            **tiny.SCHEDULE, prediction_type="v_prediction", skip_prk_steps=True, set_alpha_to_one=False
        ),
        "vae": tiny.make_vae(),
    }


def make_method(noise_level: int = 0, **others: object) -> SDUnCLIP:
    return SDUnCLIP(StableUnCLIPImg2ImgPipeline(**{**make_parts(), **others}), noise_level=noise_level)


def test_it_keeps_what_every_method_promises() -> None:
    method = make_method(noise_level=500)
    assert method.pipeline.scheduler.config.prediction_type == "v_prediction"
    parts.check_promises(method)
    parts.check_without_guidance(make_method())
    made.check_half_precision(make_method())


def test_the_embedding_is_noised_with_other_numbers_than_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    method, prompts = make_method(500), parts.make_prompts()
    drawn: list[torch.Tensor] = []
    add_noise = method.pipeline.image_noising_scheduler.add_noise

    def watch(embeds: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        drawn.append(noise)
        return add_noise(embeds, noise, timesteps)

    monkeypatch.setattr(method.pipeline.image_noising_scheduler, "add_noise", watch)
    method.generate(prompts, replace(parts.FAST, num_steps=1))

    starts = torch.stack([torch.randn(4 * 8 * 8, generator=torch.Generator().manual_seed(p.seed)) for p in prompts])
    assert drawn[0].shape == (3, EMBEDDING_WIDTH)
    assert not torch.isin(drawn[0], starts).any()


def test_the_unet_is_as_large_as_in_the_paper() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * 1024,
        )
    assert made.in_millions(unet) == 870
    assert make_method(unet=unet).trained == 870_173_124


def test_folders_are_read(tmp_path: Path) -> None:
    weights = make_parts()
    made.save_parts(tmp_path, **weights)
    method = SDUnCLIP.from_pretrained(str(tmp_path), dtype="float32")
    made.check_loaded(method, *(weights[name] for name in ("unet", "text_encoder", "image_encoder")))
    assert isinstance(method.pipeline.image_noising_scheduler, DDPMScheduler)
    prompts = parts.make_prompts()
    assert torch.equal(method.generate(prompts, parts.FAST), make_method(**weights).generate(prompts, parts.FAST))


def test_missing_weights_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = parts.check_missing(SDUnCLIP.from_pretrained, "path", monkeypatch, path=HUB_ID)
    assert "withdrawn" in told
    assert "withdrawn" not in parts.check_missing(SDUnCLIP.from_pretrained, "path", monkeypatch, path="some/copy")

    made.save_parts(tmp_path, **make_parts())
    (tmp_path / "tokenizer/tokenizer.json").unlink()
    told = parts.check_missing(SDUnCLIP.from_pretrained, "path", monkeypatch, path=str(tmp_path))
    assert "has none of tokenizer.json, vocab.json, sentencepiece.bpe.model in tokenizer/" in told
