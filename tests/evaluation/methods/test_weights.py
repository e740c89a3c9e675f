"""What the systems around Stable Diffusion share: how pictures are cut, and how weights are found and read."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ipa.errors import MissingWeights
from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.prompt_tokens import cut_squares
from ipa.evaluation.methods.weights import find_file, load_base, load_image_encoder, load_module


def test_pictures_of_all_sizes_are_cut_to_squares() -> None:
    black, white = torch.zeros(3, 20, 50, dtype=torch.uint8), torch.full((3, 9, 7), 255, dtype=torch.uint8)
    black[:, :, :10] = black[:, :, -10:] = 255  # cut off with the sides
    image_B3HW = cut_squares([Prompt(black, "", 0), Prompt(white, "", 0)], 8)
    assert image_B3HW.shape == (2, 3, 8, 8)
    torch.testing.assert_close(image_B3HW.mean((1, 2, 3)), torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("path", ["nowhere.ckpt", "owner/name", "./a/b/c.ckpt", "/no/such/file.ckpt", "~/a/b.ckpt"])
def test_a_file_that_is_not_there_is_not_asked_of_the_hub(path: str) -> None:
    with pytest.raises(MissingWeights, match=rf"^method\.adapter={path}: no such file\. Give a file"):
        find_file(path, "method.adapter")


@pytest.mark.parametrize("load", [load_base, load_image_encoder])
def test_a_folder_that_holds_nothing_is_told_with_our_key(load: Any, tmp_path: Path) -> None:
    for path in (str(tmp_path), "/no/such/folder"):
        with pytest.raises(MissingWeights, match=rf"^method\.\w+={path}\b.*give method") as caught:
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
        load_module(lambda: nn.Linear(1, 1), str(file), "a line")
    assert not trace.exists()


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    file = tmp_path / "line.pth"
    torch.save({"weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match=r"is not a line: .*bias"):
        load_module(lambda: nn.Linear(2, 2), str(file), "a line")
    with pytest.raises(ValueError, match=r"is not a line: under\.bias is missing"):
        load_module(lambda: nn.Linear(2, 2), str(file), "a line", "under.")
