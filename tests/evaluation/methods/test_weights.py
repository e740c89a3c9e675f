"""What the systems around Stable Diffusion share: how pictures are cut, and how weights are found and read."""

import inspect
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_method
from omegaconf import OmegaConf
from torch import nn

from ipa.errors import MissingWeights
from ipa.evaluation.methods.weights import find_file, load_base, load_image_encoder, load_module

CONF = Path(__file__).resolve().parents[3] / "conf/method"
SYSTEMS = ("uni_controlnet", "t2i_style", "seecoder", "controlnet_shuffle", "reference_only")


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_configuration_gives_what_the_class_takes(name: str) -> None:
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    load = get_method(content.pop("_target_"))
    assert content == {key: parameter.default for key, parameter in inspect.signature(load).parameters.items()}
    assert load.__self__.name == name


def test_pictures_of_all_sizes_are_cut_to_squares() -> None:
    black, white = torch.zeros(3, 20, 50, dtype=torch.uint8), torch.full((3, 9, 7), 255, dtype=torch.uint8)
    black[:, :, :10] = black[:, :, -10:] = 255  # cut off with the sides
    image_B3HW = squares([black, white], 8)
    assert image_B3HW.shape == (2, 3, 8, 8)
    torch.testing.assert_close(image_B3HW.mean((1, 2, 3)), torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("path", ["nowhere.ckpt", "owner/name", "./a/b/c.ckpt", "/no/such/file.ckpt", "~/a/b.ckpt"])
def test_a_file_that_is_not_there_is_not_asked_of_the_hub(path: str) -> None:
    with pytest.raises(MissingWeights, match=rf"^method\.adapter={path}: no such file\. Give a file, or one of "):
        find_file(path, "method.adapter")


@pytest.mark.parametrize("load", [load_base, load_image_encoder])
def test_a_folder_that_holds_nothing_is_told_with_our_key(load: Any, tmp_path: Path) -> None:
    for path in (str(tmp_path), "/no/such/folder"):
        with pytest.raises(MissingWeights, match=rf"^method\.\w+={path}: .*Give a folder with the weights") as caught:
            load(path, "float32")
        assert "base.path" not in str(caught.value) and "encoder.path" not in str(caught.value)


@pytest.mark.parametrize("load", [load_base, load_image_encoder])
def test_an_unknown_precision_is_told_with_our_key(load: Any, base_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^method\.dtype=float12: "):
        load(str(base_folder), "float12")


class Wicked:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_runs_no_code(old: bool, tmp_path: Path) -> None:
    file, trace = tmp_path / "wicked.pth", tmp_path / "trace"
    if old:
        file.write_bytes(pickle.dumps({"weight": Wicked(trace)}))
    else:
        torch.save({"weight": Wicked(trace)}, file)
    with pytest.raises(ValueError, match=r"^method\.adapter=.*wicked\.pth is not a line"):
        load_module(lambda state: nn.Linear(1, 1), str(file), "method.adapter", "a line")
    assert not trace.exists()


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    file = tmp_path / "line.pth"
    torch.save({"weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match=r"is not a line: .*bias"):
        load_module(lambda state: nn.Linear(2, 2), str(file), "method.adapter", "a line")
    with pytest.raises(ValueError, match=r"is not a line: it has no under\.weight"):
        load_module(lambda state: nn.Linear(*state["weight"].shape), str(file), "method.adapter", "a line", "under.")
