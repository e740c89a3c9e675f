"""The image encoder against transformers with the same weights, and how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import CLIPVisionModelWithProjection

from ipa.encoders.open_clip import OpenClipEncoder, read_pooled_width, resolve_name
from ipa.types import EncoderWidths, to_unit_range

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = {
    "ViT-H-14": (1024, 1280, 257, 224),
    "ViT-bigG-14": (1280, 1664, 257, 224),
    "ViT-L-14": (768, 1024, 257, 224),
    "ViT-L-14-quickgelu": (768, 1024, 257, 224),
    "RN50": (1024, 0, 0, 224),
    "ViT-SO400M-14-SigLIP-384": (1152, 0, 0, 384),
}
# towers besides the plain vision transformer: open_clip's ResNet, one of timm's, and a CoCa-like one that adds tokens
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None}
TIMM = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None}
OBLONG_PATCHES = tiny.clip_config()["vision_cfg"] | {"image_size": [24, 24], "patch_size": [8, 12]}
WITH_TOKENS = tiny.clip_config()["vision_cfg"] | {"output_tokens": True}


@pytest.fixture
def encoder() -> OpenClipEncoder:
    return tiny.make_encoder()


@pytest.fixture
def image() -> torch.Tensor:
    return to_unit_range(tiny.make_pictures(3, tiny.REFERENCE_PX))


@pytest.fixture
def vision(encoder: OpenClipEncoder) -> CLIPVisionModelWithProjection:
    """transformers' model with the encoder's weights."""
    return tiny.make_vision(encoder)


def normalized(encoder: OpenClipEncoder, image: torch.Tensor) -> torch.Tensor:
    return ((image + 1) / 2 - encoder.mean) / encoder.std


def test_pooled_features_are_those_of_transformers(encoder, vision, image) -> None:
    with torch.no_grad():
        theirs = vision(normalized(encoder, image)).image_embeds
    pooled = encoder.encode(image).pooled_BE

    assert pooled.shape == (3, encoder.pooled_width) == (3, tiny.POOLED_WIDTH)
    torch.testing.assert_close(pooled, theirs, rtol=0, atol=1e-4)
    assert (pooled.norm(dim=-1) - 1).abs().min() > 0.1, "they are not to be normalised"


def test_patch_features_are_the_penultimate_hidden_states(encoder, vision, image) -> None:
    with torch.no_grad():
        theirs = vision(normalized(encoder, image), output_hidden_states=True).hidden_states[-2]
    features = encoder.encode(image, uses="patches")

    assert features.pooled_BE is None
    assert features.patches_BPF.shape == (3, 1 + 9, encoder.patch_width) == (3, 10, tiny.PATCH_WIDTH)
    torch.testing.assert_close(features.patches_BPF, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("uses", ["pooled", "patches"])
def test_the_blank_picture_is_zero_after_normalisation(encoder: OpenClipEncoder, uses: Any) -> None:
    mean_colour = (2 * encoder.mean - 1).expand(1, 3, tiny.REFERENCE_PX, tiny.REFERENCE_PX)
    expected, blank = encoder.encode(mean_colour, uses), encoder.blank(2, uses)

    for ours, theirs in ((blank.pooled_BE, expected.pooled_BE), (blank.patches_BPF, expected.patches_BPF)):
        assert (ours is None) is (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=1e-5, atol=1e-5)
            assert len(ours) == 2


def test_widths_are_what_features_have(encoder: OpenClipEncoder) -> None:
    assert encoder.image_size_px == tiny.REFERENCE_PX
    assert (encoder.width("pooled"), encoder.width("patches")) == (tiny.POOLED_WIDTH, tiny.PATCH_WIDTH)


def test_the_encoder_stays_frozen_and_in_eval_mode_whatever_the_trainer_asks(encoder, image) -> None:
    encoder.train()

    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.encode(image.requires_grad_()).pooled_BE.requires_grad


def test_a_folder_is_loaded_with_the_same_weights(clip_name: str, encoder, image) -> None:
    loaded = OpenClipEncoder.from_pretrained(clip_name)

    assert loaded.source == clip_name
    assert torch.equal(loaded.encode(image).pooled_BE, encoder.encode(image).pooled_BE)


def test_a_relative_folder_becomes_absolute(clip_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(clip_name.removeprefix("local-dir:"))
    monkeypatch.chdir(folder.parent)

    assert resolve_name("local-dir:clip") == clip_name
    assert OpenClipEncoder.from_pretrained("local-dir:clip").source == "local-dir:clip"  # as given: it goes into files


def test_weights_in_half_precision_take_and_give_the_same_features(clip_name: str, encoder, image) -> None:
    half = OpenClipEncoder.from_pretrained(clip_name, dtype="bfloat16")
    pooled = half.encode(image).pooled_BE

    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.float(), encoder.encode(image).pooled_BE, rtol=0.1, atol=0.1)


def save_tower(folder: Path, vision: dict[str, Any]) -> str:
    """An open_clip folder with this image tower; returns its ``local-dir:`` name."""
    config = tiny.clip_config() | {"vision_cfg": vision}
    content = {"model_cfg": config, "preprocess_cfg": tiny.preprocess_config()}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_of_public_models_are_read_without_weights(name: str) -> None:
    assert OpenClipEncoder.read_widths(name) == WIDTHS[name]
    assert read_pooled_width(name) == WIDTHS[name][0]


@pytest.mark.parametrize("file", ["vit_h", "vit_bigg", "vit_l"])
def test_configurations_of_public_models_name_weights_that_exist(file: str) -> None:
    node: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/encoder" / f"{file}.yaml"))
    target = node.pop("_target_")

    assert target == "ipa.encoders.open_clip.OpenClipEncoder.from_pretrained"
    assert OpenClipEncoder.read_widths(**node) == WIDTHS[node["name"]]


def test_widths_read_are_those_of_the_loaded_encoder(clip_name: str, tmp_path: Path) -> None:
    loaded = OpenClipEncoder.from_pretrained(clip_name)
    config = Path(clip_name.removeprefix("local-dir:")) / "open_clip_config.json"
    (tmp_path / config.name).write_bytes(config.read_bytes())

    expected = EncoderWidths(tiny.POOLED_WIDTH, tiny.PATCH_WIDTH, 10, tiny.REFERENCE_PX)
    assert OpenClipEncoder.read_widths(f"local-dir:{tmp_path}") == loaded.widths == expected


@pytest.mark.parametrize("vision", [OBLONG_PATCHES, WITH_TOKENS], ids=["oblong patches", "with tokens"])
def test_other_vision_transformers_give_both_features(vision: dict[str, Any], tmp_path: Path) -> None:
    name = save_tower(tmp_path, vision)
    encoder = OpenClipEncoder.from_pretrained(name)
    widths = OpenClipEncoder.read_widths(name)

    assert widths == encoder.widths
    assert encoder.blank(2).pooled_BE.shape == (2, widths.pooled)
    assert encoder.blank(2, "patches").patches_BPF.shape == (2, widths.num_patches, widths.patch)


@pytest.mark.parametrize("vision", [RESNET, TIMM], ids=["resnet", "timm"])
def test_towers_without_patches_give_the_pooled_embedding_and_refuse_the_rest(vision, tmp_path: Path) -> None:
    name = save_tower(tmp_path, vision)
    encoder = OpenClipEncoder.from_pretrained(name)

    expected = EncoderWidths(tiny.POOLED_WIDTH, 0, 0, vision["image_size"])
    assert OpenClipEncoder.read_widths(name) == encoder.widths == expected
    assert encoder.blank(2).pooled_BE.shape == (2, tiny.POOLED_WIDTH)
    for ask in (encoder.width, lambda uses: encoder.blank(1, uses)):
        with pytest.raises(ValueError, match=rf"the encoder {name} gives .* no patch features .* such as ViT-H-14"):
            ask("patches")


def test_a_tower_for_oblong_pictures_is_refused(tmp_path: Path) -> None:
    name = save_tower(tmp_path, tiny.clip_config()["vision_cfg"] | {"image_size": [24, 32]})

    for read in (OpenClipEncoder.from_pretrained, OpenClipEncoder.read_widths):
        with pytest.raises(ValueError, match="reads pictures of 24 × 32"):
            read(name)


@pytest.mark.parametrize("uses", ["pooled", "patches"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_do_not_depend_on_autocast_around_them(clip_name: str, image, uses: Any, dtype: str) -> None:
    encoder = OpenClipEncoder.from_pretrained(clip_name, dtype=dtype)
    plain, blank = encoder.encode(image, uses), encoder.blank(1, uses)
    with torch.autocast("cpu", dtype=torch.float16 if dtype == "bfloat16" else torch.bfloat16):
        inside, blank_inside = encoder.encode(image, uses), encoder.blank(1, uses)

    for ours, theirs in ((inside, plain), (blank_inside, blank)):
        ours, theirs = (f.pooled_BE if uses == "pooled" else f.patches_BPF for f in (ours, theirs))
        assert ours.dtype == theirs.dtype == getattr(torch, dtype)
        assert torch.equal(ours, theirs)


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


class Trap:
    """Unpickling it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_run(
    small_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # it must not undo what we ask for
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, tmp_path / "weights.pt")

    with pytest.raises(ValueError, match=r"weights\.pt: the weights cannot be loaded: .*[Ww]eights.only"):
        OpenClipEncoder.from_pretrained(small_model, pretrained=str(tmp_path / "weights.pt"))
    assert not (tmp_path / "sprung").exists()


def test_weights_of_another_model_are_refused(small_model: str, tmp_path: Path) -> None:
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "other.safetensors")

    with pytest.raises(ValueError, match=r"other\.safetensors: the weights cannot be loaded: .*Missing key"):
        OpenClipEncoder.from_pretrained(small_model, pretrained=str(tmp_path / "other.safetensors"))


def test_nothing_starts_at_random(clip_name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"ViT-H-14 needs encoder\.pretrained=: give one of laion2b_s32b_b79k, .*a file"
    ):
        OpenClipEncoder.from_pretrained("ViT-H-14")
    config = Path(clip_name.removeprefix("local-dir:")) / "open_clip_config.json"
    (tmp_path / config.name).write_bytes(config.read_bytes())
    with pytest.raises(ValueError, match=rf"encoder\.name=local-dir:{tmp_path}: the weights cannot be loaded"):
        OpenClipEncoder.from_pretrained(f"local-dir:{tmp_path}")


READERS = [OpenClipEncoder.from_pretrained, OpenClipEncoder.read_widths]


@pytest.mark.parametrize("read", [*READERS, read_pooled_width])
def test_what_is_not_there_is_named(read, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"encoder\.name=local-dir:{tmp_path}: there is no open_clip_config\.json"
    ):
        read(f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match=r"encoder\.name=ViT-H14: .* `local-dir:FOLDER`.* Did you mean ViT-H-14\?"):
        read("ViT-H14")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("name", "pretrained", "kind", "message"),
    [
        ("ViT-bigG-14", "laion2b", ValueError, "knows no such weights; give one of laion2b_s39b_b160k, .*, a file"),
        ("ViT-bigG-14", "nowhere/w.pt", FileNotFoundError, "no such file; give one of laion2b_s39b_b160k"),
        ("ViT-L-14", "openai", ValueError, "QuickGELU; give encoder.name=ViT-L-14-quickgelu"),
        ("local-dir:demo/encoder", "openai", ValueError, "give encoder.pretrained=null"),
        ("hf-hub:nobody/nothing", None, FileNotFoundError, "the hub gives no open_clip_config.json"),
    ],
)
def test_weights_that_open_clip_would_not_find_or_misuse_are_refused(
    read, name: str, pretrained: str | None, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(kind, match=rf"encoder\.name={name}.*{message}"):
        read(name, pretrained)


@pytest.mark.parametrize("read", READERS)
def test_a_precision_that_does_not_exist_is_named(read, clip_name: str) -> None:
    with pytest.raises(ValueError, match=r"encoder\.dtype=half: one of float32, bfloat16"):
        read(clip_name, dtype="half")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("{}", "has no model_cfg with embed_dim and vision_cfg")]
)
def test_a_broken_configuration_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(content)

    with pytest.raises(ValueError, match=rf"encoder\.name=local-dir:{tmp_path}: its open_clip_config\.json {message}"):
        OpenClipEncoder.read_widths(f"local-dir:{tmp_path}")
