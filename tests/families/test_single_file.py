"""One file in the original (ldm) layout against the diffusers folder that it was written from.

The map of names in ``original_layout.py`` is the inverse of the one in diffusers, which reads the files: so the two
check each other.
"""

import shutil
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_sdxl
import torch
from original_layout import to_original, write_header
from safetensors.torch import save_file
from torch import Tensor

from ipa.errors import UserError
from ipa.families import family_of
from ipa.families.latent_diffusion import LatentDiffusion
from ipa.families.sdxl import StableDiffusionXL
from ipa.families.stable_diffusion import StableDiffusion

FAMILIES: dict[str, Callable[[], LatentDiffusion]] = {
    "1.5": lambda: tiny.make_family("v_prediction", zero_snr=True),
    "2.1": tiny_sdxl.make_family_2_1,
    "xl": tiny_sdxl.make_family,
}


class Written:
    """A family, its file, and its folder without weights."""

    def __init__(self, version: str, folder: Path) -> None:
        self.family = FAMILIES[version]()
        self.layout, self.file = str(folder / "layout"), str(folder / f"{version}.safetensors")
        self.family.pipeline().save_pretrained(self.layout)
        # with the checkpoint's own scheduler rather than the pipeline's
        self.family.scheduler.save_pretrained(f"{self.layout}/scheduler")
        for weights in Path(self.layout).rglob("*.safetensors"):
            weights.unlink()
        save_file(to_original(self.family), self.file)

    def load(self, **arguments: Any) -> LatentDiffusion:
        return type(self.family).from_pretrained(self.file, **{"config": self.layout, **arguments})


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    return cache(lambda version: Written(version, tmp_path_factory.mktemp("written")))


@pytest.fixture(params=FAMILIES)
def written(request: pytest.FixtureRequest, write: Callable[[str], Written]) -> Written:
    return write(request.param)


@pytest.fixture
def written_15(write: Callable[[str], Written]) -> Written:
    return write("1.5")


def predict(family: LatentDiffusion) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return family.denoise(latents, torch.tensor([999, 10]), family.encode_text(["cat", "a red dog"]))


def test_a_file_gives_what_the_family_gives_that_wrote_it(written: Written) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = written.load()

    assert loaded.source == written.file
    assert loaded.prediction_type == written.family.prediction_type
    assert torch.equal(loaded.alphas_cumprod, written.family.alphas_cumprod)
    assert torch.equal(predict(loaded), predict(written.family))
    state = loaded.state_dict()
    assert state.keys() == written.family.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in written.family.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_header_has_the_widths_of_the_folder(written: Written) -> None:
    family = type(written.family)
    found = family.read_widths(path=written.file, config=written.layout, dtype="bfloat16")

    assert family_of(written.file) is family and family.read_widths(written.file)[:2] == found[:2]
    assert found == family.read_widths(written.layout)


def test_a_file_can_have_its_vae_in_another_type(written: Written) -> None:
    loaded = written.load(dtype="bfloat16", vae_dtype="float32")

    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.text_encoder.parameters()} == {torch.bfloat16}
    expected = written.family.vae.state_dict()  # not rounded on the way
    assert all(torch.equal(value, expected[name]) for name, value in loaded.vae.state_dict().items())


def test_without_hub_and_layout_one_error_tells_what_to_give(
    written_15: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hub could not be asked .* Give base\.config=FOLDER") as caught:
        written_15.load(config=None)

    assert written_15.file in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"base\.config=owner/name: .*Without the hub, give a folder"):
        written_15.load(config="owner/name")


def test_a_layout_of_another_base_is_refused_before_any_weight(
    written_15: Written, write: Callable[[str], Written]
) -> None:
    for version, width in (("2.1", 20), ("xl", 28)):
        layout = write(version).layout
        with pytest.raises(UserError, match=rf"base\.config={layout} .* context width {width}, but .* with 16: give"):
            written_15.load(config=layout)


def test_a_layout_must_be_a_complete_folder(written_15: Written, tmp_path: Path) -> None:
    shutil.copytree(written_15.layout, tmp_path / "layout")
    (tmp_path / "layout/vae/config.json").unlink()
    with pytest.raises(UserError, match=rf"base\.config={tmp_path}/layout lacks a part of the layout"):
        written_15.load(config=str(tmp_path / "layout"))
    with pytest.raises(UserError, match=r"base\.config=nowhere: no such folder"):
        written_15.load(config="nowhere")
    with pytest.raises(ValueError, match=r"base\.config=.*1\.5\.safetensors is a file: give the diffusers folder"):
        written_15.load(config=written_15.file)


def test_a_file_without_its_text_encoder_says_so(written_15: Written, tmp_path: Path) -> None:
    tensors = to_original(written_15.family)
    path = str(tmp_path / "pruned.safetensors")
    save_file({name: value for name, value in tensors.items() if not name.startswith("cond_stage_model")}, path)
    with pytest.raises(ValueError, match=rf"base\.path={path}: .*CLIPTextModel.* needs its UNet, VAE and text"):
        StableDiffusion.from_pretrained(path, config=written_15.layout)


def refuse(tmp_path: Path, change: Callable[[dict[str, Iterable[int]]], object]) -> None:
    """Every reader refuses the tiny 1.5's header after ``change``."""
    shapes: dict[str, Iterable[int]] = {name: value.shape for name, value in to_original(FAMILIES["1.5"]()).items()}
    change(shapes)
    path = write_header(tmp_path / "other.safetensors", shapes.items())
    for read in (family_of, StableDiffusion.from_pretrained, StableDiffusionXL.read_widths):
        with pytest.raises(ValueError, match=rf"base\.path={path} is none of the bases that ipa knows: .*base=sdxl"):
            read(path)


def test_files_that_no_family_reads_are_refused(tmp_path: Path) -> None:
    conv_in, label = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"
    refuse(tmp_path, lambda shapes: shapes.update({conv_in: (8, 9, 3, 3)}))  # inpainting
    refuse(tmp_path, lambda shapes: shapes.update({label: (32, 42)}))  # the refiner, unCLIP
    refuse(tmp_path, lambda shapes: shapes.clear())


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    broken, pickled = tmp_path / "cut.safetensors", tmp_path / "model.ckpt"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    pickled.write_bytes(b"pickle")
    with pytest.raises(ValueError, match=rf"base\.path={broken} is not a safetensors file .* cut short"):
        StableDiffusion.from_pretrained(str(broken))
    with pytest.raises(ValueError, match=rf"base\.path={pickled}: of single files only \.safetensors are read"):
        StableDiffusion.from_pretrained(str(pickled))
    with pytest.raises(UserError, match=r"base\.path=nowhere\.safetensors: no such file"):
        StableDiffusion.read_widths("nowhere.safetensors")
