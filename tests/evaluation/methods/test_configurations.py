"""Every file of conf/method reaches its system, which says what to download where its weights are missing."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

from ipa.errors import MissingWeights
from ipa.evaluation.methods.method import Method
from ipa.export.loading import load_model

CONF = Path(__file__).resolve().parents[3] / "conf/method"
HUB = "https://huggingface.co"
DOWNLOADS = {
    "controlnet_shuffle": "hf download lllyasviel/control_v11e_sd15_shuffle --local-dir FOLDER",
    "ip_adapter": "Give adapter=FILE",
    "ip_adapter_control": "Give adapter=FILE",
    "kandinsky21": "hf download kandinsky-community/kandinsky-2-1-prior --local-dir FOLDER",
    "open_unclip": "hf download kakaobrain/karlo-v1-alpha-image-variations --local-dir FOLDER",
    "reference_only": "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir FOLDER",
    "sd_image_variations": "hf download lambdalabs/sd-image-variations-diffusers --revision v2.0 --local-dir FOLDER",
    "sd_unclip": "hf download stabilityai/stable-diffusion-2-1-unclip --local-dir FOLDER",
    "seecoder": f"{HUB}/shi-labs/prompt-free-diffusion/resolve/main/pretrained/pfd/seecoder/seecoder-v1-0.safetensors",
    "t2i_style": f"{HUB}/TencentARC/T2I-Adapter/resolve/main/models/t2iadapter_style_sd14v1.pth",
    "uni_controlnet": f"{HUB}/shihaozhao/uni-controlnet/resolve/main/uni.ckpt",
    "versatile": "hf download shi-labs/versatile-diffusion --local-dir FOLDER",
    "versatile_dual": "hf download shi-labs/versatile-diffusion --local-dir FOLDER",
}


def read(name: str) -> Any:
    return OmegaConf.merge({"adapter": None}, {"method": OmegaConf.load(CONF / f"{name}.yaml")}).method


def test_every_system_is_here() -> None:
    assert DOWNLOADS.keys() == {path.stem for path in CONF.glob("*.yaml")}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_every_option_is_one_of_the_system_and_missing_weights_are_told(name: str) -> None:
    options: Any = OmegaConf.to_container(read(name))
    load = get_method(options.pop("_target_"))
    taken = [inspect.signature(function).parameters for function in (load, load.__self__, load_model)]
    assert options.keys() <= {option for parameters in taken for option in parameters}
    assert issubclass(load.__self__, Method)
    with pytest.raises(InstantiationException) as caught:
        instantiate(read(name))
    assert isinstance(caught.value.__cause__, MissingWeights) and DOWNLOADS[name] in str(caught.value.__cause__)
