"""Starting from an adapter file: its weights, no step lost, the file needed once, misfits refused before loading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_sdxl
import torch
from bystanders import WITNESS, Witness
from conftest import QUIET, Run, World, checkpoint, column, saved_configuration
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors.torch import load_file

from ipa.errors import UserError
from ipa.export.loading import load_model
from ipa.export.published import publish_name, to_published, with_metadata
from ipa.export.storage import load_adapter, save_adapter
from ipa.types import Batch

ADAPTER = "adapter.safetensors"


def as_bin(path: Path, folder: Path) -> Path:
    """The same weights as the first published files have them."""
    save_adapter(folder / "donor.bin", *load_adapter(path))
    return folder / "donor.bin"


def first_batch(folder: Path) -> Batch:
    datamodule = instantiate(saved_configuration(folder).data)
    datamodule.fit_to(image_size_px=16, reference_size_px=24, latent_shape=(4, 8, 8))
    return next(iter(datamodule.train_dataloader()))


@pytest.mark.parametrize(
    ("experiment", "suffix"),
    [("decoupled_global", ".bin"), pytest.param("simple_fine_grained", ".safetensors", marks=pytest.mark.slow)],
)
def test_the_first_step_is_the_donors(
    train_in: Run, tmp_path: Path, variant: Callable[[str], Path], experiment: str, suffix: str
) -> None:
    donor = variant(experiment) / ADAPTER
    given = donor if suffix == ".safetensors" else as_bin(donor, tmp_path)
    start = (f"experiment={experiment}", f"adapter.init_from={given}", "trainer.max_steps=2", *QUIET)
    folder = train_in(tmp_path / "x", *start, "ema.decay=0.9")
    with torch.no_grad():
        expected = load_model(donor).errors(first_batch(folder)).loss.item()

    losses = {step: float(loss) for step, loss in column(folder, "train/loss").items()}
    assert list(losses) == [1, 2] and checkpoint(folder)["global_step"] == 2
    assert losses[1] == pytest.approx(expected, rel=1e-5)
    assert float(column(variant(experiment), "train/loss")[1]) != pytest.approx(expected, rel=1e-3)
    assert int(checkpoint(folder)["state_dict"]["average.count"]) == 2


def test_the_average_starts_at_the_file(train_in: Run, tmp_path: Path, variant: Callable[[str], Path]) -> None:
    """A step of nothing leaves both as the file has them."""
    donor = variant("decoupled_global") / ADAPTER
    still = ("optimizer.lr=1e-30", "ema.decay=0.9", "trainer.max_steps=1")
    folder = train_in(tmp_path / "x", f"adapter.init_from={donor}", *still, *QUIET, WITNESS)

    for name in (ADAPTER, "adapter_raw.safetensors"):
        torch.testing.assert_close(load_file(folder / name), load_file(donor), rtol=0, atol=0)
    trained = {publish_name(name): value.half() for name, value in Witness.module.model.trainable.state_dict().items()}
    torch.testing.assert_close(trained, load_file(donor), rtol=0, atol=0)


def test_a_resumed_run_no_longer_needs_the_file(train_in: Run, tmp_path: Path, variant: Callable[[str], Path]) -> None:
    donor = Path(shutil.copy(variant("decoupled_global") / ADAPTER, tmp_path / "donor.safetensors"))
    start = (f"adapter.init_from={donor}", *QUIET)
    folder = train_in(tmp_path / "x", *start, "trainer.max_steps=1")
    first = load_file(folder / ADAPTER)
    donor.unlink()

    train_in(folder, *start, "trainer.max_steps=2")

    assert list(column(folder, "train/loss")) == [1, 2]
    change = max(float((value - first[name]).abs().max()) for name, value in load_file(folder / ADAPTER).items())
    assert 0 < change < 0.01  # a step from where it was


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"width": 1024}, r"pooled embedding of width 12.*the adapter reads 1024.*OpenCLIP ViT-H/14"),
    ({"family": tiny_sdxl.make_family}, r"\(28 layers, context width 28\).*11 layers of context width 16"),
    ({"kind": "simple"}, "it is simple and global, the training decoupled and global"),
    ({"head": "fine_grained"}, "it is decoupled and fine-grained, the training decoupled and global"),
]


def test_a_misfit_is_refused_before_any_weight_is_read(train_in: Run, tmp_path: Path, world: World) -> None:
    """Base and encoder have configuration files only, which shows once the adapter file fits."""
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    encoder = Path(shutil.copytree(world.encoder.removeprefix("local-dir:"), tmp_path / "encoder"))
    for path in [*base.rglob("*.safetensors"), *encoder.rglob("*.safetensors")]:
        path.unlink()

    def start(width: int | None = None, family: Any = None, **options: Any) -> None:
        made = tiny.make_model(**options, **({"family": family()} if family else {}))
        tensors = to_published(made.trainable.state_dict())
        if width is not None:
            tensors["image_proj.proj.weight"] = torch.zeros(4 * tiny.CONTEXT_WIDTH, width)
        save_adapter(tmp_path / "donor.safetensors", tensors, with_metadata(tensors, {"kind": options.get("kind", "")}))
        parts = [f"base.path={base}", f"encoder.name=local-dir:{encoder}"]
        train_in(tmp_path / "x", f"adapter.init_from={tmp_path}/donor.safetensors", *parts)

    for options, complaint in MISFITS:
        with pytest.raises(UserError, match=rf"(?s)donor.*{complaint}"):
            start(**options)
    with pytest.raises(InstantiationException, match=r"base: the files of its (vae|text_encoder|unet) are missing"):
        start()
