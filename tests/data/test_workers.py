"""A batch that a data worker cannot send ends the training; no run waits for one that is lost."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from ipa.data.workers import begin, check_shared_memory
from ipa.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


class Batches(IterableDataset[Any]):
    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch)  # endless, as in training


def test_a_batch_that_cannot_be_sent_ends_the_loader() -> None:
    loader = iter(DataLoader(Batches(lambda: None), None, num_workers=1, worker_init_fn=lambda n: begin(n, 1.0)))
    with pytest.raises((RuntimeError, EOFError, ConnectionError), match=r"Bus error|exited unexpectedly|^$|reset"):
        next(loader)


def test_shared_memory_is_checked_against_what_the_workers_send(tmp_path: Path) -> None:
    check_shared_memory(10**18, workers=0)
    check_shared_memory(10**18, 4, folder=tmp_path / "no such folder")
    with pytest.raises(UserError, match=r"4 data workers need 8,000,000\.0 MB .* --shm-size.* data\.num_workers="):
        check_shared_memory(10**12, 4, folder=tmp_path)


def in_small_memory(size: str, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in a mount namespace whose /dev/shm has this size."""
    mounted = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted, "sh", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("size", "trains"), [("300k", False), ("20m", True), ("64m", True)])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_training_in_small_shared_memory_trains_or_says_why_not(
    size: str, trains: bool, workers: int, tmp_path: Path
) -> None:
    if in_small_memory("1m", "true").returncode:
        pytest.skip("mount namespaces need root")
    quick = ("trainer.max_steps=6", "scoring=null", "preview.num_prompts=0", "preview.num_scored=0", "~logger.wandb")
    made = in_small_memory(
        size, sys.executable, "train.py", f"data.num_workers={workers}", f"paths.runs={tmp_path}", *quick
    )

    assert made.returncode == (0 if trains else 1), made.stderr
    assert trains or f"{workers} data workers need" in made.stderr
    assert "Traceback" not in made.stderr
