"""The image encoder against transformers with the same weights, and how it is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from conftest import VISION, save_tower
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ipa import encoders
from ipa.encoders.open_clip import OpenClipEncoder, resolve_name
from ipa.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = {"RN50": (1024, 0, 0, 224), "ViT-SO400M-14-SigLIP-384": (1152, 1152, 729, 384)}
# configurations of the encoders of published adapters: their widths, and how messages call them
PUBLIC = {
    "vit_h": ((1024, 1280, 257, 224), "OpenCLIP ViT-H/14 (laion2b_s32b_b79k)"),
    "vit_bigg": ((1280, 1664, 257, 224), "OpenCLIP ViT-bigG/14 (laion2b_s39b_b160k)"),
    "vit_l": ((768, 1024, 257, 224), "CLIP ViT-L/14 (openai)"),
}


@pytest.fixture
def encoder() -> OpenClipEncoder:
    return tiny.make_encoder()


def normalized(encoder: OpenClipEncoder, image: torch.Tensor) -> torch.Tensor:
    return ((image + 1) / 2 - encoder.mean) / encoder.std


def test_features_are_the_embeddings_and_penultimate_hidden_states_of_transformers(encoder, image) -> None:
    with torch.no_grad():
        theirs = tiny.make_vision(encoder)(normalized(encoder, image), output_hidden_states=True)
    pooled, patches = encoder.encode(image), encoder.encode(image, uses="patches")

    torch.testing.assert_close(pooled.pooled_BE, theirs.image_embeds, rtol=0, atol=1e-4)
    assert (pooled.pooled_BE.norm(dim=-1) - 1).abs().min() > 0.1, "they are not to be normalised"
    torch.testing.assert_close(patches.patches_BPF, theirs.hidden_states[-2], rtol=0, atol=1e-4)
    assert pooled.patches_BPF is patches.pooled_BE is None


def test_a_folder_is_loaded_with_the_same_weights_also_by_a_relative_path(
    clip_name: str, encoder, image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(clip_name.removeprefix("local-dir:")).parent)
    loaded = OpenClipEncoder.from_pretrained("local-dir:clip")

    assert resolve_name("local-dir:clip") == clip_name
    assert loaded.source == "local-dir:clip"  # as given: it goes into files
    assert torch.equal(loaded.encode(image).pooled_BE, encoder.encode(image).pooled_BE)


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_of_public_models_are_read_without_weights(name: str) -> None:
    assert OpenClipEncoder.read_widths(name) == WIDTHS[name]


@pytest.mark.parametrize("file", PUBLIC)
def test_configurations_of_public_models_name_weights_that_exist(file: str) -> None:
    node: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/encoder" / f"{file}.yaml"))
    widths, public = PUBLIC[file]

    assert node.pop("_target_") == "ipa.encoders.open_clip.OpenClipEncoder.from_pretrained"
    assert OpenClipEncoder.read_widths(**node) == widths
    assert encoders.PUBLIC["pooled", widths[0]] == encoders.PUBLIC["patches", widths[1]] == public
    assert node["pretrained"] in public
    assert ("pooled", 1664) not in encoders.PUBLIC


WRONG = [
    (("local-dir:PLACE/nowhere",), "local-dir:PLACE/nowhere: there is no open_clip_config.json"),
    (("local-dir:PLACE/oblong",), "reads images of 24 × 32"),
    (("local-dir:PLACE/torn",), "encoder.name=local-dir:PLACE/torn: open_clip_config.json cannot be read"),
    (("local-dir:PLACE/foreign",), "open_clip_config.json has no model_cfg with embed_dim and vision_cfg"),
    (("ViT-H14",), "encoder.name=ViT-H14: open_clip has no such model"),
    (("ViT-H14",), "Did you mean ViT-H-14?"),
    (("ViT-H-14", "laion2b_s32b_b79k", "half"), "encoder.dtype=half: give float32, bfloat16 or"),
    (("ViT-bigG-14", "laion2b"), "knows no such weights; give one of laion2b_s39b_b160k"),
    (("ViT-bigG-14", "nowhere/w.pt"), "no such file; give one of laion2b_s39b_b160k"),
    (("ViT-L-14", "openai"), "QuickGELU; give encoder.name=ViT-L-14-quickgelu"),
    (("local-dir:demo/encoder", "openai"), "give encoder.pretrained=null"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_cannot_be_an_encoder_is_named(
    given: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing, broken, oblong, or weights that open_clip would not find or misuse."""
    monkeypatch.chdir(ROOT)
    save_tower(tmp_path / "oblong", VISION | {"image_size": [24, 32]})
    for name, content in (("torn", "{"), ("foreign", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "open_clip_config.json").write_text(content)

    name, pretrained, dtype = (*(each.replace("PLACE", str(tmp_path)) for each in given), None, None, None)[:3]
    for read in (OpenClipEncoder.from_pretrained, OpenClipEncoder.read_widths):
        with pytest.raises(UserError, match=re.escape(message.replace("PLACE", str(tmp_path)))):
            read(name, pretrained, dtype=dtype or "float32")


def test_pixels_are_normalised_before_they_are_rounded_to_half_precision(clip_name: str, encoder, image) -> None:
    half = OpenClipEncoder.from_pretrained(clip_name, dtype="bfloat16")
    seen: list[torch.Tensor] = []
    half.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    half.encode(image.to(torch.float64))

    assert torch.equal(seen[0], normalized(encoder, image).to(torch.bfloat16))


@pytest.fixture
def small_model(clip_name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that is built in for this test, as `open_clip.add_model_config` makes it, and has no public weights."""
    config = json.loads((Path(clip_name.removeprefix("local-dir:")) / "open_clip_config.json").read_text())
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-small-test", config["model_cfg"])
    return "ViT-small-test"


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_weights_are_read_from_a_file(small_model: str, encoder, image, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    weights = tiny.make_clip().state_dict()
    if suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save({"epoch": 3, "state_dict": weights}, file)  # as open_clip's training saves them
    loaded = OpenClipEncoder.from_pretrained(small_model, pretrained=str(file))

    assert (loaded.source, loaded.weights) == (small_model, str(file))
    assert torch.equal(loaded.encode(image).pooled_BE, encoder.encode(image).pooled_BE)
    assert OpenClipEncoder.read_widths(small_model, str(file)) == loaded.widths


def test_a_pickle_that_runs_code_and_weights_of_another_model_are_refused(
    small_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # it must not undo what we ask for
    torch.save({"state_dict": tiny.Harmful(tmp_path / "sprung")}, tmp_path / "weights.pt")

    with pytest.raises(UserError, match=r"weights\.pt: the weights cannot be loaded: .*[Ww]eights.only"):
        OpenClipEncoder.from_pretrained(small_model, pretrained=str(tmp_path / "weights.pt"))
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: the weights cannot be loaded: .*state_dict"):
        OpenClipEncoder.from_pretrained(small_model, pretrained=str(tmp_path / "other.safetensors"))
    assert not (tmp_path / "sprung").exists()


def test_nothing_starts_at_random() -> None:
    with pytest.raises(UserError, match=r"ViT-H-14 needs encoder\.pretrained=: give one of laion2b_s32b_b79k, .*file"):
        OpenClipEncoder.from_pretrained("ViT-H-14")
