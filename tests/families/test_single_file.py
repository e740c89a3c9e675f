"""One file in the original (ldm) layout against the diffusers folder that it was written from.

The map of names in ``original_layout.py`` is the inverse of the one in diffusers, which reads the files: so the two
check each other.
"""

import shutil
import warnings
from collections.abc import Callable
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
    family = type(written.family)
    widths = family.read_widths(path=written.file, config=written.layout, dtype="bfloat16")

    assert family_of(written.file) is family and family.read_widths(written.file)[:2] == widths[:2]
    assert widths == family.read_widths(written.layout)
    assert (loaded.source, loaded.prediction_type) == (written.file, written.family.prediction_type)
    assert torch.equal(loaded.alphas_cumprod, written.family.alphas_cumprod)
    assert torch.equal(predict(loaded), predict(written.family))
    state = loaded.state_dict()
    assert state.keys() == written.family.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in written.family.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_file_can_have_its_vae_in_another_type(written: Written) -> None:
    loaded = written.load(dtype="bfloat16", vae_dtype="float32")

    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.text_encoder.parameters()} == {torch.bfloat16}
    expected = written.family.vae.state_dict()  # not rounded on the way
    assert all(torch.equal(value, expected[name]) for name, value in loaded.vae.state_dict().items())


def test_without_hub_and_layout_one_error_tells_what_to_give(written_15: Written) -> None:
    with pytest.raises(UserError, match=r"hub could not be asked .* Give base\.config=FOLDER") as caught:
        written_15.load(config=None)

    assert written_15.file in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"base\.config=owner/name: .*Without the hub, give a folder"):
        written_15.load(config="owner/name")


def test_a_layout_must_be_a_complete_folder_of_the_same_base(
    written_15: Written, write: Callable[[str], Written], tmp_path: Path
) -> None:
    shutil.copytree(written_15.layout, tmp_path / "layout")
    (tmp_path / "layout/vae/config.json").unlink()
    others = [(write(version).layout, width) for version, width in (("2.1", 20), ("xl", 28))]
    for layout, message in (
        (f"{tmp_path}/layout", "lacks a part of the layout"),
        ("nowhere", "no such folder"),
        (written_15.file, "is a file: give the diffusers folder"),
        *((layout, f".* context width {width}, but .* with 16: give") for layout, width in others),
    ):
        with pytest.raises(UserError, match=rf"base\.config={layout}:? {message}"):
            written_15.load(config=layout)


def test_what_is_no_such_file_is_named(written_15: Written, tmp_path: Path) -> None:
    pruned, broken, pickled = (tmp_path / name for name in ("pruned.safetensors", "cut.safetensors", "model.ckpt"))
    tensors = to_original(written_15.family)
    save_file({name: value for name, value in tensors.items() if not name.startswith("cond_stage_model")}, pruned)
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    pickled.write_bytes(b"pickle")
    for path, message in (
        (pruned, ": .*CLIPTextModel.* needs its UNet, VAE and text"),
        (broken, " is not a safetensors file .* cut short"),
        (pickled, r": of single files only \.safetensors are read"),
        ("nowhere.safetensors", ": no such file"),
    ):
        with pytest.raises(UserError, match=rf"base\.path={path}{message}"):
            StableDiffusion.from_pretrained(str(path), config=written_15.layout)


def test_files_that_no_family_reads_are_refused(written_15: Written, tmp_path: Path) -> None:
    shapes = {name: value.shape for name, value in to_original(written_15.family).items()}
    conv_in, label = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"
    inpainting, refiner = {**shapes, conv_in: (8, 9, 3, 3)}, {**shapes, label: (32, 42)}  # or unCLIP
    for header in (inpainting, refiner, {}):
        path = write_header(tmp_path / "other.safetensors", header.items())
        for read in (family_of, StableDiffusion.from_pretrained, StableDiffusionXL.read_widths):
            with pytest.raises(UserError, match=rf"base\.path={path} is none of the bases that ipa knows: .*base=sdxl"):
                read(path)
