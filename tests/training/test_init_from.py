"""Starting from an adapter file: its weights, no step lost, the file needed once, misfits refused before loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bystanders import WITNESS, Witness
from conftest import QUIET, Run, checkpoint, column, saved_configuration
from hydra.utils import instantiate
from safetensors.torch import load_file

from ipa.export.loading import load_model
from ipa.export.published import publish_name
from ipa.export.storage import load_adapter, save_adapter
from ipa.types import Batch

ADAPTER = "adapter.safetensors"


def first_batch(folder: Path) -> Batch:
    datamodule = instantiate(saved_configuration(folder).data)
    datamodule.fit_to(image_size_px=16, reference_size_px=24, latent_shape=(4, 8, 8))
    return next(iter(datamodule.train_dataloader()))


@pytest.mark.parametrize(
    ("experiment", "suffix"),
    [("decoupled_global", ".bin"), pytest.param("simple_fine_grained", ".safetensors", marks=pytest.mark.slow)],
)
def test_the_first_step_is_the_donors_whose_file_a_resumed_run_no_longer_needs(
    train_in: Run, tmp_path: Path, variant: Callable[[str], Path], experiment: str, suffix: str
) -> None:
    """The same weights as the first published files have them, too."""
    donor, copy = variant(experiment) / ADAPTER, tmp_path / f"donor{suffix}"
    save_adapter(copy, *load_adapter(donor))
    start = (f"experiment={experiment}", f"adapter.init_from={copy}", *QUIET, "ema.decay=0.9")
    folder = train_in(tmp_path / "x", *start, "trainer.max_steps=1")
    first = load_file(folder / ADAPTER)
    copy.unlink()
    train_in(folder, *start, "trainer.max_steps=2")
    with torch.no_grad():
        expected = load_model(donor).errors(first_batch(folder)).loss.item()

    losses = {step: float(loss) for step, loss in column(folder, "train/loss").items()}
    assert list(losses) == [1, 2] and checkpoint(folder)["global_step"] == 2
    assert losses[1] == pytest.approx(expected, rel=1e-5)
    assert float(column(variant(experiment), "train/loss")[1]) != pytest.approx(expected, rel=1e-3)
    assert int(checkpoint(folder)["state_dict"]["average.count"]) == 2
    change = max(float((value - first[name]).abs().max()) for name, value in load_file(folder / ADAPTER).items())
    assert 0 < change < 0.01  # a step from where it was


def test_the_average_starts_at_the_file(train_in: Run, tmp_path: Path, variant: Callable[[str], Path]) -> None:
    """A step of nothing leaves both as the file has them."""
    donor = variant("decoupled_global") / ADAPTER
    still = ("optimizer.lr=1e-30", "ema.decay=0.9", "trainer.max_steps=1")
    folder = train_in(tmp_path / "x", f"adapter.init_from={donor}", *still, *QUIET, WITNESS)

    for name in (ADAPTER, "adapter_raw.safetensors"):
        torch.testing.assert_close(load_file(folder / name), load_file(donor), rtol=0, atol=0)
    trained = {publish_name(name): value.half() for name, value in Witness.module.model.trainable.state_dict().items()}
    torch.testing.assert_close(trained, load_file(donor), rtol=0, atol=0)
