"""FLUX, Chroma and Stable Diffusion 3: text, latents and sizes as in the public pipelines, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flow
import torch
from torch.utils.checkpoint import checkpoint

from ipa.adapter.heads import GlobalHead
from ipa.adapter.kinds import SimpleAdapter
from ipa.errors import UserError
from ipa.families import family_of
from ipa.families.chroma import Chroma
from ipa.families.flow import FlowTimes
from ipa.families.flux import Flux, image_ids
from ipa.families.sd3 import StableDiffusion3
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, generate
from ipa.types import to_unit_range

MAKERS = tiny_flow.MAKERS
TEXTS = ["cat", "a red dog"]


@pytest.fixture(scope="module", params=list(MAKERS))
def family(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("bases")
    return {name: tiny_flow.save(MAKERS[name](), place / name) for name in ("flux", "chroma", "sd35_medium")}


def test_text_is_encoded_as_by_the_public_pipelines_and_read_for_images_that_are_not_square(family: Any) -> None:
    pipeline, text = family.pipeline(), family.encode_text(TEXTS)
    length = {"max_sequence_length": tiny_flow.T5_LENGTH}
    if isinstance(family, StableDiffusion3):
        states, _, pooled, _ = pipeline.encode_prompt(TEXTS, TEXTS, TEXTS, do_classifier_free_guidance=False, **length)
    elif isinstance(family, Chroma):
        states, _, mask, *_ = pipeline.encode_prompt(TEXTS, do_classifier_free_guidance=False, **length)
        pooled = None
        assert torch.equal(text.mask_BL.float(), mask)
    else:
        states, pooled, _ = pipeline.encode_prompt(TEXTS, TEXTS, **length)

    torch.testing.assert_close(text.states_BLD, states, rtol=0, atol=1e-6)
    torch.testing.assert_close(text.pooled_BE, pooled, rtol=0, atol=1e-6)
    assert family.cut_off("a" * 50) and not family.cut_off("cat")
    noisy, time_B = torch.randn(2, 4, 4, 8), torch.tensor([0.5, 0.1]) * family.time_factor  # not square
    assert family.denoise(noisy, time_B, text).shape == noisy.shape


def test_latents_are_packed_and_scaled_as_by_the_public_pipeline() -> None:
    family = tiny_flow.make_flux()
    pipeline: Any = family.pipeline()
    latents = torch.randn(2, 4, 8, 12)
    packed = family.pack(latents)

    assert torch.equal(packed, pipeline._pack_latents(latents, 2, 4, 8, 12))
    assert torch.equal(family.unpack(packed, (4, 8, 12)), latents)
    assert torch.equal(image_ids(4, 6).float(), pipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32))
    pixels = to_unit_range(tiny.make_pictures(2, tiny.IMAGE_PX))
    encoded = family.vae.encode(pixels).latent_dist
    torch.testing.assert_close(family.encode_pixels(pixels).mean_BCHW, (encoded.mean - 0.1) * 0.4)
    torch.testing.assert_close(
        family.decode_latents((encoded.mean - 0.1) * 0.4), family.vae.decode(encoded.mean).sample.clamp(-1, 1)
    )


def test_folders_are_recognised_and_loaded_again(folders: dict[str, str]) -> None:
    classes = {"flux": Flux, "chroma": Chroma, "sd35_medium": StableDiffusion3}
    for name, cls in classes.items():
        path = folders[name]
        options = {"time_width": tiny_flow.TIME_WIDTH} if cls is StableDiffusion3 else {}
        assert family_of(path) is cls
        made, loaded = MAKERS[name](), cls.from_pretrained(path, **options)
        assert loaded.widths == made.widths == cls.read_widths(path, **options)
        assert cls.read_image_size_px(path) == loaded.image_size_px == tiny.IMAGE_PX
        assert loaded.fingerprints() == made.fingerprints()
        assert loaded.blocks() == cls.read_blocks(path)[: len(loaded.blocks())]
        assert cls.read_size_multiple_px(path) == loaded.size_multiple_px
        noisy, time_B, text = torch.randn(1, 4, 8, 8), torch.tensor([0.5]), made.encode_text(["cat"])
        torch.testing.assert_close(loaded.denoise(noisy, time_B, text), made.denoise(noisy, time_B, text))
        for other in set(classes.values()) - {cls}:
            with pytest.raises(UserError, match=rf"is a {cls.title} pipeline: use base="):
                other.read_widths(path)


def test_a_folder_without_files_of_a_part_is_refused(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would make an empty tokenizer, which encodes all texts alike."""
    monkeypatch.setattr(Flux.pipeline_class, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    for part, pattern in (("tokenizer_2", "*"), ("text_encoder_2", "*.safetensors"), ("scheduler", "*")):
        shutil.copytree(folders["flux"], tmp_path / part)
        for file in (tmp_path / part / part).glob(pattern):
            file.unlink()
        with pytest.raises(UserError, match=rf"base\.path=.*: the files of its {part} are missing"):
            Flux.from_pretrained(str(tmp_path / part))


def test_stable_diffusion_3_without_t5_reads_zeros_as_the_pipeline_does() -> None:
    family = tiny_flow.make_sd3(t5=False)
    text = family.encode_text(TEXTS)

    assert text.states_BLD.shape[1] == tiny.TEXT_LENGTH + 256
    assert not text.states_BLD[:, tiny.TEXT_LENGTH :].any() and "t5_ids" not in family.prepare_text(TEXTS)


def copy_configurations(base: str, target: Path, transformer: dict[str, Any], **index: Any) -> str:
    """A folder without weights, with changes to the configuration of the transformer and to the parts."""
    (target / "transformer").mkdir(parents=True)
    for name, changes in (("model_index.json", index), ("transformer/config.json", transformer)):
        (target / name).write_text(json.dumps(json.loads((Path(base) / name).read_text()) | changes))
    return str(target)


def test_bases_that_read_more_than_latents_or_have_no_t5_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    filling = copy_configurations(folders["flux"], tmp_path / "fill", {"in_channels": 96, "out_channels": 16})
    with pytest.raises(UserError, match=r"none of the bases that ipa knows: .*Chroma"):
        family_of(filling)
    for name, part in (("flux", "text_encoder_2"), ("chroma", "text_encoder"), ("sd35_medium", "text_encoder_3")):
        folder = copy_configurations(folders[name], tmp_path / name, {}, **{part: [None, None]})
        with pytest.raises(UserError, match=rf"has no {part}, its T5 text encoder"):
            family_of(folder).from_pretrained(folder)
    assert StableDiffusion3.read_widths(folder, t5=False).branches == "sd3"


def test_wrong_words_and_sizes_are_refused() -> None:
    """What else the families lack is refused by name at the start of a training: tests/training/test_refusals.py."""
    with pytest.raises(UserError, match=r"base\.hosts=some: give double .* or all"):
        tiny_flow.make_flux(hosts="some")
    for option in ("timesteps", "weighting", "shift"):
        with pytest.raises(UserError, match=rf"base\.times\.{option}=odd: give "):
            FlowTimes(**{option: "odd"})
    with pytest.raises(UserError, match="positions of the base tiny end at 32 px"):
        tiny_flow.make_sd3().check_size(64)


def test_chroma_does_not_read_masked_text_and_needs_its_mask() -> None:
    family, flux = tiny_flow.make_chroma(), tiny_flow.make_flux()
    text = family.encode_text(["cat"])
    noisy, time_B = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    before = family.denoise(noisy, time_B, text)
    kept = int(text.mask_BL.sum())
    assert 1 < kept < tiny_flow.T5_LENGTH
    text.states_BLD = text.states_BLD.clone()
    text.states_BLD[:, kept:] += 1
    torch.testing.assert_close(family.denoise(noisy, time_B, text), before, rtol=0, atol=1e-6)
    text.states_BLD[:, : kept - 1] += 1
    assert not torch.allclose(family.denoise(noisy, time_B, text), before, atol=1e-3)

    with pytest.raises(UserError, match=r"mask of the text .* is missing"):
        family.text_states(flux.prepare_text(TEXTS))
    with pytest.raises(UserError, match="mask of the text is missing"):
        family.denoise(noisy, time_B, flux.encode_text(["cat"]))


def test_checkpointed_gradients_are_the_same(family: Any) -> None:
    """Also Chroma's, whose masks diffusers forgets in recomputed single-stream blocks."""
    latents, time_B = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.1]) * family.time_factor
    text = family.encode_text(TEXTS)
    kept = []

    def run_again(module: torch.nn.Module, *inputs: Any) -> Any:
        kept.append(module)
        return checkpoint(module, *inputs, use_reentrant=False)

    def gradient() -> torch.Tensor:
        noisy = latents.clone().requires_grad_()
        return torch.autograd.grad(family.denoise(noisy, time_B, text).square().sum(), noisy)[0]

    expected = gradient()
    family.checkpoint_gradients(run_again)
    found = gradient()
    family.denoiser.disable_gradient_checkpointing()

    assert len(kept) >= 3 and torch.equal(found, expected)


@torch.no_grad()
def test_a_simple_adapter_puts_its_tokens_behind_the_text(family: Any) -> None:
    encoder = tiny.make_encoder()
    width = SimpleAdapter.token_width(family.widths)
    model = IPAdapterModel(family, encoder, GlobalHead.fitting(encoder.widths, width), SimpleAdapter())
    features = model.encode_reference(tiny.make_pictures(2, tiny.REFERENCE_PX))
    text, tokens = family.encode_text(TEXTS), model.image_tokens(features)
    extended = model.adapter.extend(text, None)
    assert extended is text
    with model.prompted(text, tokens, 1.0) as extended:
        assert torch.equal(extended.states_BLD[:, -4:], tokens)
        assert extended.mask_BL is None or extended.mask_BL[:, -4:].all()
    options = SamplingOptions(num_steps=1, guidance=3.0)
    images = [generate(model, features, TEXTS, [1, 2], options.with_scale(scale)) for scale in (1.0, 0.0)]

    assert (images[0] - images[1]).abs().max() > 1e-3
