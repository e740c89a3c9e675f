"""Every form in which an adapter is saved is read by one reader; what is not an adapter is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from omegaconf import OmegaConf
from public_forms import FORMS, save
from torch import Tensor

from ipa.errors import UserError
from ipa.export.loading import known_sources, load_into, load_model
from ipa.export.published import to_published, with_metadata
from ipa.export.reading import read_adapter
from ipa.export.storage import nested, save_adapter
from ipa.model import IPAdapterModel
from ipa.sampling import draw_noise
from ipa.tools.export import Options, export

NAME = "adapter.safetensors"


@pytest.fixture(scope="module")
def trained() -> IPAdapterModel:
    return tiny.shake(tiny.make_model())


def published(model: IPAdapterModel) -> dict[str, Tensor]:
    return to_published(model.trainable.state_dict(), torch.float32)


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny.make_family().pipeline()


def picture(stock: Any, folder: Path, name: str = NAME) -> Tensor:
    """What diffusers makes of the adapter file in a folder, with guidance."""
    stock.load_ip_adapter(str(folder), subfolder="", weight_name=name, image_encoder_folder=None)
    pooled = torch.linspace(-1, 1, tiny.POOLED_WIDTH).reshape(1, 1, -1)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    embeds = [torch.stack([torch.zeros_like(pooled), pooled]).flatten(0, 1)]
    out = stock("cat", latents=draw_noise((4, 8, 8), [3]), ip_adapter_image_embeds=embeds, **options).images
    stock.unload_ip_adapter()
    return out


@pytest.fixture(scope="module")
def expected(trained: IPAdapterModel, stock: Any, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    folder = tmp_path_factory.mktemp("original")
    save_adapter(folder / NAME, published(trained), {})
    return picture(stock, folder)


@pytest.mark.parametrize("form", FORMS)
def test_every_public_form_gives_the_adapter_and_its_picture_in_diffusers(
    form: str,
    trained: IPAdapterModel,
    stock: Any,
    expected: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = save(form, trained, tmp_path)
    adapter = read_adapter(path)

    assert adapter.tensors.keys() == published(trained).keys()
    assert all(torch.equal(adapter.tensors[name], value) for name, value in published(trained).items())
    assert FORMS[form] in " ".join(adapter.remarks)
    export(OmegaConf.structured(Options(adapter=str(path), out=str(tmp_path / "out" / NAME), dtype="float32")))
    said = capsys.readouterr().out
    assert all(remark in said for remark in adapter.remarks)
    assert torch.equal(picture(stock, tmp_path / "out"), expected)
    assert ("readable by diffusers: yes" in said) == is_read_by_diffusers(stock, path, expected)


def is_read_by_diffusers(stock: Any, path: Path, expected: Tensor) -> bool:
    """The file as it is."""
    if path.is_dir():
        return False
    try:
        return torch.equal(picture(stock, path.parent, path.name), expected)
    except (ValueError, KeyError, OSError):
        return False


def test_training_and_sampling_read_them_too_and_log_what_was_left_out(
    trained: IPAdapterModel, base_folder: Path, clip_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save("accelerate", trained, tmp_path)
    other = tiny.make_model()
    load_into(other, path)
    model = load_model(path, str(base_folder), clip_name)

    assert caplog.text.count("left out: unet") == 2
    for name, value in trained.trainable.state_dict().items():
        assert torch.equal(other.trainable.state_dict()[name], value)
        assert torch.equal(model.trainable.state_dict()[name], value)


def test_two_adapters_in_one_file_are_refused(trained: IPAdapterModel, tmp_path: Path) -> None:
    state = published(trained)
    torch.save({"model": state, "ema": {name: value + 1 for name, value in state.items()}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"two adapters: model\.image_proj.* and ema\.image_proj"):
        read_adapter(tmp_path / "a.pt")


def test_an_adapter_that_lost_its_branches_is_no_simple_one(trained: IPAdapterModel, tmp_path: Path) -> None:
    """Only metadata makes it one."""
    head = {name: value for name, value in published(trained).items() if name.startswith("image_proj")}
    for name, metadata in (("a.bin", {}), ("a.safetensors", {}), ("b.safetensors", {"kind": "decoupled"})):
        save_adapter(tmp_path / name, head, metadata)
        with pytest.raises(UserError, match=r"no branches .*Give ipa\.tools\.export the checkpoint"):
            read_adapter(tmp_path / name)
    save_adapter(tmp_path / "c.safetensors", head, {"kind": "simple"})
    assert read_adapter(tmp_path / "c.safetensors").file.kind == "simple"


def quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def with_nan(tensor: Tensor) -> Tensor:
    return tensor.clone().index_fill_(0, torch.tensor([1]), torch.nan)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Tensor.to_sparse, "is sparse"),
        (quantized, "holds qint8"),
        (lambda tensor: tensor.to("meta"), "has no values"),
        (Tensor.int, "holds int32"),
        (Tensor.bool, "holds bool"),
        (lambda tensor: tensor.to(torch.complex64), "holds complex64"),
        (with_nan, "holds numbers that are not finite"),
        (lambda tensor: tensor.double() * 1e300, "holds numbers that are not finite"),
    ],
    ids=["sparse", "quantized", "meta", "integer", "bool", "complex", "nan", "too_large"],
)
def test_tensors_that_no_adapter_has_are_named(
    change: Callable[[Tensor], Tensor], words: str, trained: IPAdapterModel, tmp_path: Path
) -> None:
    tensors = published(trained) | {"image_proj.proj.bias": change(published(trained)["image_proj.proj.bias"])}
    torch.save(nested(tensors), tmp_path / "a.bin")
    files = ["a.bin"]
    if change is Tensor.int:
        files.append("a.safetensors")
        save_adapter(tmp_path / files[1], tensors, {})
    for file in files:
        with pytest.raises(UserError, match=rf"{file}: image_proj\.proj\.bias {words}"):
            read_adapter(tmp_path / file)


def test_base_and_encoder_are_found_in_the_run_by_the_names_in_the_metadata(
    base_folder: Path, clip_name: str, tmp_path: Path
) -> None:
    """The file names no folder of this machine; away from its run it asks."""
    trained = tiny.make_model()
    trained.family.source, trained.encoder.source = str(base_folder), clip_name
    run = tmp_path / "run"
    save_adapter(run / NAME, published(trained), with_metadata(published(trained), trained.describe()))
    config = {"base": {"path": str(base_folder), "config": None}, "encoder": {"name": clip_name, "pretrained": None}}
    OmegaConf.save(OmegaConf.create(config), run / "config.yaml")

    assert read_adapter(run).metadata["base"] == base_folder.name
    assert read_adapter(run).metadata["encoder"] == "local-dir:clip"
    assert str(base_folder.parent) not in str((run / NAME).read_bytes())
    assert load_model(run).family.source == load_model(run / NAME).family.source == str(base_folder)
    single = config | {"base": {"path": "/elsewhere/base", "config": "of/its/layout"}}
    OmegaConf.save(OmegaConf.create(single), run / "config.yaml")
    known = known_sources(read_adapter(run).metadata, run / "checkpoints/step_00000003.ckpt")
    assert known == {"base": "/elsewhere/base", "base_config": "of/its/layout", "encoder": clip_name}
    (run / NAME).rename(tmp_path / NAME)
    with pytest.raises(UserError, match=r"base base and the encoder local-dir:clip; .* give base=… or encoder=…"):
        load_model(tmp_path / NAME)
    OmegaConf.save(OmegaConf.create(config | {"base": {"path": "of/another"}}), tmp_path / "config.yaml")
    with pytest.raises(UserError, match="give base=…"):
        load_model(tmp_path / NAME)
