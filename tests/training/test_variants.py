"""All four variants train, and their files sample again; the files hold the average, which previews and scores show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HELDOUT, QUIET, SOME_EXPERIMENTS, Run, checkpoint, saved_configuration
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ipa.export.loading import load_model
from ipa.export.published import publish_name
from ipa.export.reading import read_adapter
from ipa.training.previews import Column, HeldOutPrompts, Previews, generate_columns, score_pictures

FILES = ("adapter.safetensors", "adapter_raw.safetensors")


def held_out(folder: Path) -> HeldOutPrompts:
    """The prompts of a run's previews and scores."""
    datamodule = instantiate(saved_configuration(folder).data)
    datamodule.fit_to(image_size_px=16, reference_size_px=24, latent_shape=(4, 8, 8))
    prompts = HeldOutPrompts.from_datamodule(datamodule, HELDOUT)
    assert prompts is not None
    return prompts


@pytest.fixture(params=SOME_EXPERIMENTS)
def experiment(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(variant: Callable[[str], Path], experiment: str) -> Path:
    return variant(experiment)


def test_it_samples_from_its_file(folder: Path) -> None:
    model, prompts = load_model(folder / FILES[0]), held_out(folder)
    options = instantiate(saved_configuration(folder).sampling)
    pictures = {
        scale: generate_columns(model, [Column(prompts, options.with_scale(scale), 3)])[0] for scale in (0.0, 1.0)
    }
    same_prompt = HeldOutPrompts(prompts.images_B3HW, prompts.references_B3HW[[1, 1, 2, 3, 4, 5]], prompts.captions)
    other = generate_columns(model, [Column(same_prompt, options, 3)])[0]

    assert pictures[1.0].shape == (HELDOUT, 3, 16, 16) and pictures[1.0].isfinite().all()
    assert not torch.allclose(pictures[0.0], pictures[1.0], atol=1e-3)
    assert not torch.allclose(other[0], pictures[1.0][0], atol=1e-3)
    torch.testing.assert_close(other[1:], pictures[1.0][1:], rtol=0, atol=1e-5)


def test_the_files_say_what_they_are_and_hold_the_average_and_the_raw_weights(folder: Path, experiment: str) -> None:
    kind, _, head = experiment.partition("_")
    adapter = read_adapter(folder / FILES[0])
    file, metadata = adapter.file, adapter.metadata
    assert (file.kind, file.head, file.num_tokens) == (kind, head, {"global": 4, "fine_grained": 16}[head])
    assert (metadata["kind"], metadata["head"], metadata["step"]) == (kind, head, "6")
    assert bool(file.hidden) == (kind == "decoupled")

    state = checkpoint(folder)["state_dict"]
    files = [load_file(folder / name) for name in FILES]
    for prefix, tensors in zip(("average.", "trainable."), files, strict=True):
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        expected = {publish_name(name): value.half() for name, value in weights.items() if name != "count"}
        torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
    assert int(state["average.count"]) == 6
    assert any(not torch.equal(files[0][name], files[1][name]) for name in files[0])


def pixels(picture: Image.Image) -> Tensor:
    return pil_to_tensor(picture).float()


def test_previews_show_the_average(variant: Callable[[str], Path]) -> None:
    """Drawn again from the files, fp16 as they are, the last grid is that of the average."""
    folder = variant("decoupled_global")
    cfg = saved_configuration(folder)
    previews = Previews(folder, 0, instantiate(cfg.sampling), text=cfg.preview.text, seed=cfg.seed)
    shown, prompts = Image.open(folder / "previews/step_000006.png"), held_out(folder).head(3)
    columns = previews.columns(prompts)
    drawn = [previews.draw(prompts, generate_columns(load_model(folder / name), columns)) for name in FILES]
    average, raw = ((pixels(grid) - pixels(shown)).abs().mean().item() for grid in drawn)

    assert average < 0.1
    assert raw > 4 * average


def test_final_scores_are_the_averages(variant: Callable[[str], Path]) -> None:
    folder = variant("decoupled_global")
    cfg = saved_configuration(folder)
    told = json.loads((folder / "summary.json").read_text())["scores"]["scale 1"]
    options, prompts = instantiate(cfg.scoring.options), held_out(folder).head(cfg.scoring.num_prompts)

    def scored(name: str) -> dict[str, Any]:
        pictures = generate_columns(load_model(folder / name), [Column(prompts, options, cfg.scoring.seed)])[0]
        return score_pictures(instantiate(cfg.judge), prompts, pictures, "cpu")

    average, raw = (abs(scored(name)["border_lab"] - told["border_lab"]) for name in FILES)
    assert average < 0.1 * raw


def test_the_file_names_a_head_that_its_tensors_do_not_show(train_in: Run, tmp_path: Path) -> None:
    """InstantX' head on a UNet looks like a FaceID adapter's."""
    options = ("experiment=decoupled_mlp", "tokens.num_tokens=4", "adapter.layout=ipa", "trainer.max_steps=1")
    folder = train_in(tmp_path / "run", *QUIET, *options)

    assert read_adapter(folder / "adapter.safetensors").file.head == "mlp"
