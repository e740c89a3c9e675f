"""What the families share: telling them apart, their widths at full size, checkpointed gradients."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import tiny
import tiny_sdxl
import torch
from diffusers import EDMEulerScheduler, UNet2DConditionModel
from original_layout import unet_to_original, write_header
from published_files import HIDDEN, UNETS

from ipa.errors import UserError
from ipa.families import family_of
from ipa.families.latent_diffusion import LatentDiffusion
from ipa.families.sdxl import StableDiffusionXL
from ipa.families.stable_diffusion import StableDiffusion
from ipa.types import to_unit_range

MAKERS: list[Callable[[], LatentDiffusion]] = [tiny.make_family, tiny_sdxl.make_family_2_1, tiny_sdxl.make_family]

SD = UNETS["sd15"]
# the UNet's configuration, D, and the hosts of docs/architecture.md's published layout
PUBLISHED = {
    "sd15": (SD, 768, HIDDEN["sd15"]),
    "sd21": (
        SD | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        1024,
        HIDDEN["sd15"],
    ),
    "sdxl": (UNETS["sdxl"], 2048, HIDDEN["sdxl"]),
}


def write_configuration(folder: Path, unet: dict[str, Any], **index: Any) -> str:
    """A pipeline folder without any weight."""
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **unet}))
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts, **index}))
    return str(folder)


@pytest.mark.parametrize("base", PUBLISHED)
def test_full_size_folders_and_files_tell_their_family_and_the_published_order(base: str, tmp_path: Path) -> None:
    config, context, hosts = PUBLISHED[base]
    family = StableDiffusionXL if base == "sdxl" else StableDiffusion
    folder = write_configuration(tmp_path / base, config)
    with torch.device("meta"):
        tensors = unet_to_original(UNet2DConditionModel.from_config(config))
    shapes = [(name, value.shape) for name, value in tensors.items()]
    if base == "sdxl":
        shapes.append(("conditioner.embedders.1.model.ln_final.bias", (1280,)))
    shapes.sort(key=lambda item: item[0])  # as files have them: block 10 stands before block 2
    file = write_header(tmp_path / f"{base}.safetensors", shapes)

    assert Path(file).stat().st_size > 1e9
    assert len(hosts) == {"sd15": 16, "sd21": 16, "sdxl": 70}[base]
    other = StableDiffusion if base == "sdxl" else StableDiffusionXL
    for path in (folder, file):
        assert family_of(path) is family
        assert family.read_widths(path)[:2] == (context, hosts)
        for read in (other.from_pretrained, other.read_widths):
            with pytest.raises(UserError, match=rf"base\.path={path} is a {family.title} pipeline: use base="):
                read(path)


@pytest.mark.parametrize(
    ("unet", "index"),
    [
        pytest.param({"in_channels": 9}, {}, id="inpainting"),
        pytest.param({"class_embed_type": "projection"}, {}, id="unCLIP"),
        pytest.param({"addition_embed_type": "text_time"}, {"text_encoder": [None, None]}, id="refiner"),
        pytest.param({"addition_embed_type": "text"}, {}, id="DeepFloyd IF"),
    ],
)
def test_folders_that_no_family_reads_are_refused(unet: dict[str, Any], index: dict[str, Any], tmp_path: Path) -> None:
    path = write_configuration(tmp_path / "base", SD | unet, **index)
    for read in (family_of, StableDiffusion.from_pretrained, StableDiffusionXL.read_widths):
        with pytest.raises(ValueError, match=rf"base\.path={path} is none of the bases that ipa knows: .*base=sd15"):
            read(path)


def test_bases_without_a_unet_its_configuration_or_alphas_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "x"]}')
    with pytest.raises(UserError, match=r"none of the bases that ipa knows"):
        family_of(str(tmp_path))
    path = write_configuration(tmp_path / "base", SD)
    shutil.rmtree(tmp_path / "base/unet")
    with pytest.raises(UserError, match=rf"base\.path={path}/unet: .*config\.json"):
        StableDiffusion.read_widths(path)
    made = tiny.make_family()
    parts = {name: getattr(made, name) for name in made.part_names} | {"scheduler": EDMEulerScheduler()}
    with pytest.raises(UserError, match=r"base\.path=mine samples with EDMEulerScheduler"):
        StableDiffusion("mine", **parts)


def test_importing_families_and_encoders_is_light() -> None:
    heavy = {"torch", "diffusers", "open_clip", "transformers"}
    code = f"import sys, ipa.families, ipa.encoders; print({heavy} & {{*sys.modules}})"

    assert run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("make", MAKERS)
def test_the_base_stays_frozen_and_in_eval_mode_and_its_vae_in_its_type(
    make: Callable[[], LatentDiffusion],
) -> None:
    """Whatever trainer and autocast ask."""
    family, pixels = make().train(), to_unit_range(tiny.make_pictures(2, tiny.IMAGE_PX))
    assert not any(module.training for module in family.modules())
    assert not any(parameter.requires_grad for parameter in family.parameters())
    expected = family.encode_pixels(pixels).mean_BCHW
    decoded = family.decode_latents(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(family.encode_pixels(pixels).mean_BCHW, expected)
        assert torch.equal(family.decode_latents(expected), decoded)


@pytest.mark.parametrize(
    ("make", "context", "hidden"),
    [*zip(MAKERS, (tiny.CONTEXT_WIDTH, 20, 28), (tiny.HIDDEN, tiny.HIDDEN, tiny_sdxl.HIDDEN), strict=True)],
)
def test_sizes_and_hosts_follow_from_the_parts(
    make: Callable[[], LatentDiffusion], context: int, hidden: list[int]
) -> None:
    family = make()
    published = [name.removesuffix(".processor") for name in family.unet.attn_processors if "attn2" in name]

    assert (family.size_multiple_px, family.image_size_px, family.context_width) == (2, tiny.IMAGE_PX, context)
    assert family.latent_shape(32) == (4, 16, 16)
    assert [(host.name, host.width) for host in family.hosts()] == list(zip(published, hidden, strict=True))
    assert all(host.attention is family.unet.get_submodule(host.name) for host in family.hosts())


@pytest.mark.parametrize("make", MAKERS)
def test_a_text_is_its_ids_encoded(make: Callable[[], LatentDiffusion]) -> None:
    family, texts, sizes = make(), ["cat", "", "a much longer red dog than fits"], torch.arange(18).view(3, 6)
    inputs = family.prepare_text(texts)
    expected, found = family.encode_text(texts, sizes), family.text_condition(family.text_states(inputs), sizes)
    ids_BL = inputs["ids"]

    assert ids_BL.shape == (3, len(family.tokenizers) * tiny.TEXT_LENGTH) and ids_BL.dtype == torch.int64
    assert all(torch.equal(family.prepare_text([text])["ids"][0], ids_BL[i]) for i, text in enumerate(texts))
    pairs = zip(vars(expected).values(), vars(found).values(), strict=True)
    assert all(x is y is None or torch.equal(x, y) for x, y in pairs)


def test_tokenizers_that_give_other_ids_have_another_hash() -> None:
    """Of those of SDXL, which pad differently, both count."""
    family, xl = tiny.make_family(), tiny_sdxl.make_family()
    first_BL, second_BL = xl.split_ids(xl.prepare_text(["cat"]))
    assert torch.equal(first_BL[:, :5], second_BL[:, :5]) and not torch.equal(first_BL, second_BL)
    before = family.tokenizer_hash()
    assert before == tiny.make_family(seed=1).tokenizer_hash() == family.tokenizer_hash()
    padded, shorter = tiny.make_tokenizer(), tiny.make_tokenizer()
    padded.pad_token, shorter.model_max_length = padded.bos_token, 8
    hashes = {before, xl.tokenizer_hash()}
    for family.tokenizer in (padded, shorter):
        hashes.add(family.tokenizer_hash())

    assert len(hashes) == 4


def test_2_1_predicts_v_with_the_heads_of_its_levels_and_ignores_sizes() -> None:
    family = tiny_sdxl.make_family_2_1()
    assert (family.prediction_type, family.context_width) == ("v_prediction", tiny_sdxl.TEXT_WIDTHS[1])
    assert [host.attention.heads for host in family.hosts()] == [1, 1, 2, 2, 2, 2, 2, 1, 1, 1, 4]
    text = family.encode_text(["cat", "dog"], torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]))

    assert torch.equal(text.states_BLD, family.encode_text(["cat", "dog"]).states_BLD)
    assert (text.pooled_BE, text.size_B6) == (None, None)
    assert family.prompt_arguments(text, None) == {"prompt_embeds": text.states_BLD}
    assert family.prompt_arguments(text, text).keys() == {"prompt_embeds", "negative_prompt_embeds"}
