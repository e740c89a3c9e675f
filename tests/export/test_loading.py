"""Adapter files into models: found parts, given parts, and misfits reported before any weight is read."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flow
import tiny_sdxl
import torch
from torch import Tensor

from ipa.encoders import open_encoder
from ipa.errors import UserError
from ipa.export.loading import load_into, load_model
from ipa.export.published import to_published, with_metadata
from ipa.export.storage import save_adapter
from ipa.model import IPAdapterModel

WEIGHTS = ("*.safetensors", "*.bin")


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_sdxl") / "base"
    tiny_sdxl.make_family().pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same encoder in transformers' layout."""
    folder = tmp_path_factory.mktemp("tiny_vision") / "image_encoder"
    tiny.make_vision(tiny.make_encoder()).save_pretrained(folder)
    return folder


def without_weights(folder: Path, copy: Path) -> Path:
    """A copy that holds configuration alone."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*WEIGHTS))
    assert not [path for pattern in WEIGHTS for path in copy.rglob(pattern)]
    return copy


@torch.no_grad()
def predict(model: IPAdapterModel) -> Tensor:
    latents, t_B, text, tokens = tiny.make_inputs(model)
    return model.predict(latents, t_B, text, tokens, 0.7)


@pytest.mark.parametrize(
    ("head", "kind", "name"),
    [
        ("fine_grained", "simple", "sd"),
        ("full", "decoupled", "sd"),
        ("global", "decoupled", "sdxl"),
    ],
)
def test_parts_come_from_the_metadata(
    head: str, kind: str, name: str, base_folder: Path, sdxl_folder: Path, clip_name: str, tmp_path: Path
) -> None:
    path, base = tmp_path / "adapter.safetensors", sdxl_folder if name == "sdxl" else base_folder
    family = tiny_sdxl.make_family() if name == "sdxl" else tiny.make_family("v_prediction", zero_snr=True)
    parts = {"base": str(base), "encoder": clip_name}
    trained = tiny.write_adapter(path, parts, head=head, kind=kind, family=family)
    trained.adapter.install()
    model = load_model(path)

    assert (model.adapter.name, type(model.head), type(model.family)) == (kind, type(trained.head), type(family))
    assert (model.family.source, model.encoder.source) == (str(base), clip_name)
    torch.testing.assert_close(predict(model), predict(trained), rtol=0, atol=1e-5)


def test_an_adapter_that_was_trained_without_t5_is_used_without_it(clip_name: str, tmp_path: Path) -> None:
    """Also on a base that has none."""
    trained = tiny.shake(tiny_flow.make_model(tiny_flow.make_sd3, t5=False))
    parts = {"base": tiny_flow.save(trained.family, tmp_path / "base"), "encoder": clip_name}
    tensors = to_published(trained.trainable.state_dict(), torch.float32, branches="sd3")
    save_adapter(tmp_path / "a.safetensors", tensors, with_metadata(tensors, {**trained.describe(), **parts}))
    model = load_model(tmp_path / "a.safetensors")
    texts = [each.family.encode_text(["cat"]).states_BLD for each in (model, trained)]

    torch.testing.assert_close(*texts)
    metadata = {name: value for name, value in trained.describe().items() if name != "t5"}
    save_adapter(tmp_path / "b.safetensors", tensors, with_metadata(tensors, {**metadata, **parts}))
    with pytest.raises(UserError, match="has no text_encoder_3, its T5"):
        load_model(tmp_path / "b.safetensors")


def test_a_published_file_takes_the_parts_that_are_given(
    base_folder: Path, clip_name: str, image_encoder: Path, tmp_path: Path
) -> None:
    """Without metadata, and in either layout of the encoder."""
    path = tmp_path / "adapter.bin"
    family = tiny.make_family("v_prediction", zero_snr=True)
    trained = tiny.shake(tiny.make_model(head="fine_grained", family=family))
    save_adapter(path, to_published(trained.trainable.state_dict(), torch.float32), {})
    trained.adapter.install()

    for encoder in (clip_name, str(image_encoder)):
        model = load_model(path, base=str(base_folder), encoder=encoder)
        torch.testing.assert_close(predict(model), predict(trained), rtol=0, atol=1e-4)


def test_preprocessing_and_layer_are_recorded_in_the_metadata(
    base_folder: Path, clip_name: str, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.safetensors"
    family, _, head, adapter = parts_of(tiny.make_model(head="fine_grained"))
    trained = IPAdapterModel(family, open_encoder(clip_name, layer="-1"), head, adapter, reference_fit="pad")
    tensors = to_published(trained.trainable.state_dict())
    save_adapter(path, tensors, with_metadata(tensors, trained.describe()))
    model = load_model(path, str(base_folder), clip_name, dtype="bfloat16")

    assert (model.reference_fit, model.encoder.layer) == ("pad", -1)
    assert model.describe() == trained.describe() | {"base": base_folder.name}
    assert model.family.unet.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.trainable.parameters()} == {torch.float32}
    assert torch.isfinite(predict(model)).all()
    with pytest.raises(UserError, match=r"data\.reference_fit=stretch: one of crop, pad, squash"):
        IPAdapterModel(*parts_of(model), reference_fit="stretch")


def parts_of(model: IPAdapterModel) -> tuple[Any, ...]:
    return model.family, model.encoder, model.head, model.adapter


def test_metadata_that_are_missing_or_not_known_are_reported_before_anything_is_read(
    model: IPAdapterModel, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "a.bin", to_published(model.trainable.state_dict()), {})
    tiny.write_adapter(tmp_path / "a.safetensors", {"preprocessing": "faces only, 112 px"})
    with pytest.raises(UserError, match=r"a\.safetensors was trained .* faces only, 112 px\. Known: .*centre crop; "):
        load_model(tmp_path / "a.safetensors", "no base", "no encoder")
    for given, missing in (({}, "base and encoder"), ({"base": "b"}, "encoder"), ({"encoder": "e"}, "base")):
        with pytest.raises(UserError, match=rf"a\.bin does not say which {missing} .*: give .*a global IP-Adapter for"):
            load_model(tmp_path / "a.bin", **given)


def test_misfits_are_reported_before_any_weight_is_read(
    base_folder: Path, sdxl_folder: Path, image_encoder: Path, tmp_path: Path
) -> None:
    base = without_weights(base_folder, tmp_path / "base")
    encoder = without_weights(image_encoder, tmp_path / "encoder")
    tiny.write_adapter(tmp_path / "sdxl.safetensors", head="fine_grained", family=tiny_sdxl.make_family())
    with pytest.raises(UserError, match=rf"It does not fit: the base {base} has {len(tiny.HIDDEN)} layers"):
        load_model(tmp_path / "sdxl.safetensors", str(base), str(encoder))

    tiny.write_adapter(tmp_path / "fitting.safetensors")
    with pytest.raises(UserError, match=str(base)):  # what fits is loaded after that
        load_model(tmp_path / "fitting.safetensors", str(base), str(encoder))
    tensors = to_published(tiny.make_model().trainable.state_dict())
    tensors["image_proj.proj.weight"] = torch.zeros(4 * tiny.CONTEXT_WIDTH, 1280)
    save_adapter(tmp_path / "a.safetensors", tensors, {})
    with pytest.raises(UserError, match=rf"the encoder {encoder} gives pooled embedding of width 12"):
        load_model(tmp_path / "a.safetensors", str(base), str(encoder))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "fine_grained"}, "it is decoupled and fine-grained, the training decoupled and global"),
        ({"num_tokens": 7}, r"it has tokens\.num_tokens=7, the training 4"),
        ({"head": "fine_grained", "heads": 2, "num_tokens": 5}, r"num_tokens=5, .*resampler\.heads=2, the training 1"),
        ({"kind": "simple"}, "it is simple and global, the training decoupled and global"),
        ({"family": "sdxl"}, r"It does not fit: the base tiny has 11 layers"),
    ],
    ids=str,
)
def test_a_file_for_another_training_is_refused_and_changes_nothing(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    if options.get("family"):
        options = {"family": tiny_sdxl.make_family()}
    tiny.write_adapter(tmp_path / "a.safetensors", **options)
    model = tiny.make_model(head="fine_grained" if "heads" in options else "global")
    before = {name: value.clone() for name, value in model.trainable.state_dict().items()}
    with pytest.raises(UserError, match=words):
        load_into(model, tmp_path / "a.safetensors")

    assert all(torch.equal(value, before[name]) for name, value in model.trainable.state_dict().items())
