"""Optimizers beside AdamW: each resumes to the bit, files have averaged weights, misuse is refused before loading."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed
from conftest import Run, assert_same_run, checkpoint, compose, rewound
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import nn

from ipa.errors import MissingWeights
from ipa.export.loading import load_model
from ipa.training.optimizers import MuonWithAdamW, check_optimizer, state_bytes

CASES = {
    "adamw8bit": ("bitsandbytes", ["optimizer.lr=0.01"]),
    "schedule_free": ("schedulefree", ["optimizer.lr=0.01", "optimizer.warmup_steps=2"]),
    "prodigy": ("prodigyopt", ["optimizer.lr=1"]),
    "muon": ("torch", ["optimizer.lr=0.01"]),
}
SLOW = ("adamw8bit", "prodigy")
HERE = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(find_spec(package) is None, reason=f"pip install {package}"),
            *([pytest.mark.slow] if name in SLOW else []),
        ],
    )
    for name, (package, _) in CASES.items()
]
FAST = (
    "preview.num_scored=0",
    "preview.num_prompts=1",
    "image_prompt_check.every_n_steps=2",
    "scoring=null",
    "trainer.gradient_clip_val=0.5",
)


@pytest.mark.parametrize("name", HERE)
def test_a_run_resumes_to_the_bit(name: str, train_in: Run, tmp_path: Path) -> None:
    """With previews, for which a schedule-free optimizer exchanges the weights."""
    overrides = [*FAST, f"optimizer={name}", *CASES[name][1]]
    whole = train_in(tmp_path / "whole", *overrides)
    assert_same_run(train_in(rewound(whole, tmp_path / "x"), *overrides), whole)
    if name == "schedule_free":
        seldom = train_in(tmp_path / "seldom", *overrides, "preview.every_n_steps=4")
        assert_average_is_written(whole, checkpoint(seldom))


def assert_average_is_written(folder: Path, seldom: dict[str, Any]) -> None:
    """x = y + (1 − 1/β₁)(z − y); the training weights y are next to it as raw ones, and do not depend on previews."""
    saved = checkpoint(folder)
    names = [name.removeprefix("trainable.") for name in saved["state_dict"] if name.startswith("trainable.")]
    z = [state["z"] for state in saved["optimizer_states"][0]["state"].values()]
    model = load_model(folder)  # of its last checkpoint
    for name, z_i in zip(names, z, strict=True):
        y = saved["state_dict"][f"trainable.{name}"]
        x = y.lerp(z_i, 1 - 1 / 0.9)
        assert torch.equal(y, seldom["state_dict"][f"trainable.{name}"])
        assert torch.equal(saved["state_dict"][f"average.{name}"], x) and not torch.equal(x, y)
        assert torch.equal(model.trainable.state_dict()[name], x)
    files = [load_file(folder / f"adapter{which}.safetensors") for which in ("", "_raw")]
    assert any(not torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    """With gradients of one singular value, Muon moves along the gradient; a wrong state would move otherwise."""
    matrix, vector = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))
    optimizer = MuonWithAdamW([vector, matrix], lr=0.1, weight_decay=0.0)
    assert [group["params"] for group in optimizer.param_groups] == [[matrix], [vector]]
    before = matrix.detach().clone()
    matrix.grad, vector.grad = torch.randn(6, 4), torch.ones(5)
    optimizer.step()
    singular = torch.linalg.svdvals(before - matrix.detach())

    assert optimizer.state[matrix].keys() == {"momentum_buffer"} and "exp_avg" in optimizer.state[vector]
    assert singular.max() < 2 * singular.min()  # the update is about orthogonal
    assert float((before - matrix.detach()).square().mean().sqrt()) == pytest.approx(0.02, rel=0.3)  # 0.2 lr, AdamW's


@pytest.mark.parametrize("name", ["adamw", "schedule_free", "prodigy", "muon"])
def test_an_estimate_of_memory_counts_the_state(name: str) -> None:
    weight, cfg = nn.Parameter(torch.ones(30, 20)), composed("train", f"optimizer={name}").optimizer
    optimizer = instantiate(cfg)([weight])
    weight.grad = torch.ones(30, 20)
    optimizer.step()

    kept = [x.nbytes for x in optimizer.state[weight].values() if isinstance(x, torch.Tensor) and x.numel() == 600]
    assert sum(kept) == 600 * state_bytes(cfg)


def test_a_missing_package_is_named_and_the_memory_of_its_state_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose(tmp_path / "run", "optimizer=adamw8bit")
    assert state_bytes(cfg.optimizer) == 2
    monkeypatch.setattr("ipa.training.optimizers.find_spec", lambda package: None)
    with pytest.raises(MissingWeights, match="pip install bitsandbytes"):
        check_optimizer(cfg)
