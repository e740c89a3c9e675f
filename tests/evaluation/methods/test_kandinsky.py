from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_pipelines as made
import tiny_prompt_tokens as parts
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    KandinskyPipeline,
    KandinskyPriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    VQModel,
)
from transformers import XLMRobertaTokenizer

from ipa.evaluation.methods.kandinsky import Kandinsky21
from ipa.evaluation.methods.pipelines import read_classes, to_pil

EMBEDDING_WIDTH = tiny.CONTEXT_WIDTH  # as wide as the text states of CLIP
TEXT_WIDTH = 20
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "▁", *tiny.VOCABULARY[:26], "<mask>"]
TextEncoder = read_classes(KandinskyPipeline)["text_encoder"]
DECODER = {
    "addition_embed_type": "text_image",
    "encoder_hid_dim_type": "text_image_proj",
    "in_channels": 4,
    "out_channels": 8,
}


def make_prior_parts() -> dict[str, object]:
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        embedding_dim=EMBEDDING_WIDTH,
        num_embeddings=tiny.TEXT_LENGTH,
        additional_embeddings=4,
    )
    return {
        "prior": parts.loud(prior),
        "image_encoder": parts.loud(parts.make_vision(EMBEDDING_WIDTH)),
        "text_encoder": made.make_text_encoder(EMBEDDING_WIDTH),
        "tokenizer": tiny.make_tokenizer(),
        "scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
        "image_processor": made.make_processor(),
    }


def make_text_encoder() -> object:
    config = TextEncoder.config_class(
        transformerDimSize=TEXT_WIDTH,
        imageDimSize=EMBEDDING_WIDTH,
        hidden_size=TEXT_WIDTH,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(WORDS),
        max_position_embeddings=80,
        pad_token_id=1,
    )
    return parts.loud(TextEncoder(config))


def make_decoder_parts() -> dict[str, object]:
    unet = made.make_unclip_decoder(**DECODER, encoder_hid_dim=TEXT_WIDTH, addition_embed_type_num_heads=2)
    movq = VQModel(
        block_out_channels=(32, 32),  # its normalisation has 32 groups
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=8,
        norm_num_groups=4,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    return {
        "text_encoder": make_text_encoder(),
        "tokenizer": XLMRobertaTokenizer(vocab=[(word, 0.0) for word in WORDS], model_max_length=77),
        "unet": unet,
        "scheduler": DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False),
        "movq": movq,
    }


def make_method(**others: object) -> Kandinsky21:
    prior = KandinskyPriorPipeline(**make_prior_parts())
    return Kandinsky21(prior, KandinskyPipeline(**{**make_decoder_parts(), **others}), prior_steps=2)


def test_it_keeps_what_every_method_promises() -> None:
    method = make_method()
    parts.check_promises(method)
    parts.check_without_guidance(method)
    made.check_half_precision(method)


def test_embeddings_are_those_of_the_priors_interpolation() -> None:
    method, prompts = make_method(), parts.make_prompts()
    found_BE = method.embeddings(prompts, [torch.Generator().manual_seed(prompt.seed) for prompt in prompts])
    for embedding_E, prompt, picture in zip(found_BE, prompts, to_pil(prompts), strict=True):
        theirs = method.prior.interpolate(
            [picture, prompt.text] if prompt.text else [picture],
            [0.5, 0.5] if prompt.text else [1.0],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(prompt.seed),
        )
        torch.testing.assert_close(embedding_E, theirs.image_embeds[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(method.prior.get_zero_embed(1), theirs.negative_image_embeds)


def test_an_empty_text_leaves_the_image_alone() -> None:
    method, prompts = make_method(), [replace(prompt, text="") for prompt in parts.make_prompts()]
    generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    assert torch.equal(method.embeddings(prompts, generators), method.encode_images(prompts))


def test_the_decoder_is_as_large_as_in_the_paper() -> None:
    widths = {"block_out_channels": (384, 768, 1152, 1536), "cross_attention_dim": 768, "encoder_hid_dim": 1024}
    unet = made.make_full_unclip_decoder(**DECODER, **widths)
    assert make_method(unet=unet).trained == 1_228_661_768  # 1229 M


def test_sizes_are_multiples_of_what_the_pipeline_can_make() -> None:
    method, prompts = make_method(), parts.make_prompts()
    assert method.generate(prompts, replace(parts.FAST, image_size_px=20)).shape == (3, 3, 20, 20)
    with pytest.raises(ValueError, match=r"image_size_px=18: kandinsky21 needs a multiple of 4"):
        method.generate(prompts, replace(parts.FAST, image_size_px=18))


def test_folders_are_read(tmp_path: Path) -> None:
    prior, decoder = make_prior_parts(), make_decoder_parts()
    decoder["scheduler"] = DDPMScheduler()
    made.save_parts(tmp_path / "prior", **prior)
    made.save_parts(tmp_path / "decoder", **decoder)
    folders = {"path": str(tmp_path / "decoder"), "prior_path": str(tmp_path / "prior")}
    method = Kandinsky21.from_pretrained(**folders, dtype="float32", prior_steps=2)
    made.check_loaded(method, prior["prior"], prior["image_encoder"], decoder["unet"], decoder["movq"])
    made.check_loaded(method, decoder["text_encoder"])
    assert isinstance(method.decoder.scheduler, DDPMScheduler), "the checkpoint's own"

    same = Kandinsky21(KandinskyPriorPipeline(**prior), KandinskyPipeline(**decoder), prior_steps=2)
    prompts = parts.make_prompts()
    assert torch.equal(method.generate(prompts, parts.FAST), same.generate(prompts, parts.FAST))


def test_prior_and_decoder_have_options_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = made.save_parts(tmp_path, **make_prior_parts())
    parts.check_missing(Kandinsky21.from_pretrained, "path", monkeypatch, path="some/decoder", prior_path=str(prior))
    (prior / "prior" / "config.json").unlink()
    parts.check_missing(Kandinsky21.from_pretrained, "prior_path", monkeypatch, path="x/y", prior_path=str(prior))
