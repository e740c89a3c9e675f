"""Train one of the compared systems on the samples of the adapters: same order, noise, times and drops.

    python -m demo.paper.train_system variations steps=700 seed=1 out=runs/paper/systems/variations

AdamW; gradient clipping, schedule and moving average are those of the demo recipe. Started again, it resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import MISSING
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from demo.paper import ROOT
from demo.paper.plan import BATCH
from demo.paper.systems import SYSTEMS, Trained, new_system, trained_state
from ipa import objective
from ipa.cli import quiet_libraries
from ipa.export.storage import save_adapter
from ipa.files import write_atomically, write_json
from ipa.tools.options import option, run_tool
from ipa.training.run import keep_freed_memory
from ipa.types import Batch, to_unit_range

SAVE_EVERY, REPORT_EVERY = 50, 10
EMA = 0.99


@dataclass
class Options:
    name: str = option(MISSING, "the system", one_of=tuple(SYSTEMS))
    steps: int = option(700, "steps of 16 samples", at_least=1)
    seed: int = option(1, "of the samples and the initial weights", at_least=0)
    out: str = option(MISSING, "folder for system.safetensors")


def recipe(seed: int) -> Any:
    """The configuration of the adapters' trainings."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [f"seed={seed}", "name=x"])


def samples(cfg: Any, family: Any, reference_px: int) -> Any:
    """The datamodule of a training's configuration."""
    data, size_px = instantiate(cfg.data), family.image_size_px
    data.batch_size = BATCH
    data.fit_to(image_size_px=size_px, reference_size_px=reference_px, latent_shape=family.latent_shape(size_px))
    return data


def loss_of(system: Trained, batch: Batch, generator: torch.Generator) -> Tensor:
    """As ``IPAdapterModel.errors``."""
    family, draws = system.family, batch.draws
    assert batch.image_B3HW is not None
    x0_BCHW = family.encode_pixels(to_unit_range(batch.image_B3HW)).sample(draws.posterior_noise_BCHW)
    corrupted = family.corrupt(x0_BCHW, draws.noise_BCHW, draws.time_B)
    prediction = system.predict(corrupted.noisy, corrupted.time_B, batch, generator)
    return (corrupted.weight_B * objective.squared_error(prediction, corrupted.target)).mean()


class Training:
    """Everything that a checkpoint holds."""

    def __init__(self, system: Trained, data: Any, steps: int) -> None:
        self.system, self.data, self.step = system, data, 0
        self.parts = nn.ModuleDict({name: part for name, (part, _) in system.parts().items()})
        self.parts.requires_grad_(True)
        groups = [{"params": part.parameters(), "lr": lr} for part, lr in system.parts().values()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, steps // 20, steps)
        self.average = AveragedModel(self.parts, multi_avg_fn=get_ema_multi_avg_fn(EMA))

    def state(self) -> dict[str, Any]:
        names = ("parts", "optimizer", "schedule", "average")
        return {"step": self.step, "data": self.data.state_dict(), **{n: getattr(self, n).state_dict() for n in names}}

    def load(self, state: dict[str, Any]) -> None:
        self.step = state.pop("step")
        for name, own in state.items():
            getattr(self, name).load_state_dict(own)

    def make_step(self, batch: Batch) -> None:
        generator = torch.Generator().manual_seed(self.step)  # what a resumed step needs is its number
        loss_of(self.system, batch, generator).backward()
        nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.parts)
        self.data.consumed(batch)
        self.step += 1


def batches(data: Any) -> Iterator[Batch]:
    while True:
        yield from data.train_dataloader()


def train(options: Any) -> Path:
    keep_freed_memory()
    out, checkpoint = Path(options.out), Path(options.out) / "checkpoint.pt"
    torch.manual_seed(options.seed)
    system = new_system(options.name)
    data = samples(recipe(options.seed), system.family, system.encoder.image_size_px)
    training = Training(system, data, options.steps)
    if checkpoint.is_file():
        training.load(torch.load(checkpoint, weights_only=True))
    for batch in batches(data):
        if training.step >= options.steps:
            break
        training.make_step(batch)
        if training.step % REPORT_EVERY == 0:
            write_json(out / "progress.json", {"step": training.step})
        if training.step % SAVE_EVERY == 0:
            write_atomically(checkpoint, lambda path: torch.save(training.state(), path))
    training.parts.load_state_dict(
        {name.removeprefix("module."): x for name, x in training.average.state_dict().items() if name != "n_averaged"}
    )
    state = trained_state(system)
    metadata = {"parameters": str(system.trained), "steps": str(options.steps)}
    path = out / "system.safetensors"
    save_adapter(path, state, metadata)
    checkpoint.unlink(missing_ok=True)
    return path


def main() -> None:
    quiet_libraries()
    run_tool(sys.argv[1:], Options, train, __doc__, positional=("name",))


if __name__ == "__main__":
    main()
