"""Two processes with two data workers each: shards of their own, one checkpoint of all, and any readers after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from tars import good, write_tar
from torch import Tensor, nn

from ipa.data.datamodule import ShardDataModule
from ipa.types import Batch

STEPS, STOPS = 12, (5, 9)


class Writer(LightningModule):
    """Writes the keys and the first noise of every batch into a file of its rank."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.weight = Path(folder), nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Batch) -> Tensor:
        rows = list(zip(batch.keys, batch.draws.noise_BCHW[:, 0, 0, 0].tolist(), strict=True))
        with (self.folder / f"{self.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(rows) + "\n")
        return self.weight * batch.draws.time_B.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Consume(Callback):
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch: Batch, index: int) -> None:
        trainer.datamodule.consumed(batch)
        if trainer.global_step in STOPS:
            trainer.save_checkpoint(Path(module.folder) / f"{trainer.global_step}.ckpt")


def run(
    folder: Path, shards: Sequence[str], ranks: int, workers: int, checkpoint: Path | None = None, **options: object
) -> list:
    """The rows of each step, sorted, over all ranks."""
    folder.mkdir()
    data = ShardDataModule(list(shards), batch_size=4 // ranks, num_workers=workers, window=7, **options)
    data.fit_to(image_size_px=8, reference_size_px=6, latent_shape=(2, 3, 3))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    strategy = DDPStrategy(start_method="spawn") if ranks > 1 else "auto"
    trainer = Trainer(
        max_steps=STEPS, devices=ranks, strategy=strategy, callbacks=[Consume()], enable_checkpointing=False, **quiet
    )
    trainer.fit(Writer(str(folder)), datamodule=data, ckpt_path=checkpoint)
    made = [[json.loads(line) for line in (folder / f"{r}.jsonl").read_text().splitlines()] for r in range(ranks)]
    return [sorted(row for rank in step for row in rank) for step in zip(*made, strict=True)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_rank_resumes_what_two_began(tmp_path: Path) -> None:
    shards = [write_tar(tmp_path / f"{s}.tar", [m for i in range(9) for m in good(f"{s}{i:04d}")]) for s in range(8)]

    both = run(tmp_path / "both", shards, ranks=2, workers=2)
    checkpoint = tmp_path / "both" / "5.ckpt"
    alone = run(tmp_path / "alone", shards, 1, 0, lanes={"ranks": 2, "workers": 2})
    rest = run(tmp_path / "rest", shards, 1, 3, checkpoint)
    again = run(tmp_path / "again", shards, 2, 1, checkpoint)
    third = run(tmp_path / "third", shards, 2, 2, tmp_path / "again" / "9.ckpt")

    assert len(both) == STEPS and all(len(step) == 4 for step in both)
    assert alone == both
    assert rest == again == both[5:]
    assert third == both[9:]
    keys = [row[0] for step in both for row in step]
    assert len(set(keys)) == len(keys)  # 48 of the 72 samples of a pass
