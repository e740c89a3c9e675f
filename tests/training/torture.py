"""Kill -9 of a random rank at random moments under torchrun, which starts the group anew; nothing may be lost.

    python tests/training/torture.py --kills 30
    python tests/training/torture.py --kills 10 data.pairs.by=style      # also with other options of train.py

Two ranks with two data workers each train in a tiny world. Every second kill waits for a checkpoint that is being
written. When the kills are over the run comes to its end, and the adapter, the checkpoint and the losses in the log
have to be, bit for bit, those of a run that nobody disturbed. Exit code 1 when they are not.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS / "training"), str(TESTS), str(ROOT)]

RANKS, WORKERS = 2, 2
STEPS, EVERY = 1000, 5  # of the whole run, and between checkpoints
PATIENCE_S = 180  # for a restarted group to write a checkpoint


def overrides(world: list[str], runs: Path, name: str) -> list[str]:
    few = ["preview.num_prompts=1", "preview.num_scored=1", "preview.every_n_steps=500", "scoring=null"]
    much = [f"trainer.max_steps={STEPS}", f"checkpoint.every_n_steps={EVERY}", f"data.num_workers={WORKERS}"]
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={RANKS}", "ema.decay=0.99"]
    return [*world, *few, *much, *ranks, "~logger.wandb", f"paths.runs={runs}", f"name={name}"]


def torchrun(options: list[str], restarts: int, output: Path) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command = [*launcher, f"--max-restarts={restarts}", "--monitor-interval=0.2", str(ROOT / "train.py"), *options]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}", "XDG_CACHE_HOME": str(output.parent / "cache")}
    environment = {**os.environ, **own}
    return subprocess.Popen(command, stdout=output.open("ab"), stderr=subprocess.STDOUT, env=environment)


@dataclass
class Group:
    """The run that is tortured."""

    agent: subprocess.Popen[bytes]
    checkpoints: Path
    draw: random.Random
    kills: int = 0
    within_checkpoint: int = 0
    of_rank: list[int] = field(default_factory=lambda: [0] * RANKS)

    def steps(self) -> int:
        """Of the newest checkpoint."""
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        return max((int(name[5:-5]) for name in names if name.endswith(".ckpt")), default=0)

    def begun(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(name.endswith(".tmp") for name in os.listdir(self.checkpoints))

    def ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for process in psutil.Process(self.agent.pid).children():
            with suppress(psutil.Error, KeyError):  # it ended, or has not begun
                found[int(process.environ()["LOCAL_RANK"])] = process
        return found

    def wait_for(self, what: Callable[[], bool], pause_s: float) -> None:
        until = time.monotonic() + PATIENCE_S
        while not what():
            if self.agent.poll() is not None:
                raise SystemExit(f"the run came to its end (code {self.agent.returncode}) after {self.kills} kills")
            if time.monotonic() > until:
                raise SystemExit(f"no progress within {PATIENCE_S} s after {self.kills} kills")
            time.sleep(pause_s)

    def kill_one(self, within_checkpoint: bool) -> None:
        before = self.steps()
        self.wait_for(lambda: self.steps() > before and len(self.ranks()) == RANKS, 0.05)
        ranks, victim = self.ranks(), self.draw.randrange(RANKS)
        time.sleep(self.draw.uniform(0, 0.8))
        if within_checkpoint:
            self.wait_for(self.begun, 0)
        os.kill(ranks[victim].pid, signal.SIGKILL)
        self.within_checkpoint += self.begun()
        self.kills += 1
        self.of_rank[victim] += 1
        ranks[victim].wait()


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs."""
    import torch
    from safetensors.torch import load_file

    from ipa.training.checkpointing import checkpoints_in, read_checkpoint

    def differing(kind: str, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
        assert a.keys() == b.keys()
        return [f"{kind} {name}" for name in a if not torch.equal(a[name], b[name])]

    found = []
    for name in ("adapter.safetensors", "adapter_raw.safetensors"):
        found += differing(name, load_file(one / name), load_file(other / name))
    ends = [read_checkpoint(checkpoints_in(run / "checkpoints")[0]) for run in (one, other)]
    found += differing("checkpoint", *(end["state_dict"] for end in ends))
    logs = [(run / "log.csv").open(newline="") for run in (one, other)]
    losses = [{row["step"]: row["train/loss"] for row in csv.DictReader(log)} for log in logs]
    return found + [f"loss of step {step}" for step in losses[0] if losses[0][step] != losses[1].get(step)]


def torture(folder: Path, world: list[str], kills: int, seed: int) -> Group:
    """Returns what was done; raises SystemExit when the run does not come through."""
    from tqdm import trange

    whole = torchrun(overrides(world, folder, "whole"), 0, folder / "whole.log")
    if whole.wait():
        raise SystemExit(f"the undisturbed run failed, see {folder}/whole.log")
    options = overrides(world, folder, "tortured")
    agent = torchrun(options, kills + 5, folder / "tortured.log")
    group = Group(agent, folder / "decoupled_global/tortured/checkpoints", random.Random(seed))
    try:
        for number in trange(kills, desc="kills"):
            group.kill_one(within_checkpoint=number % 2 == 1)
        if agent.wait():
            raise SystemExit(f"the run did not come to its end, see {folder}/tortured.log")
    finally:
        agent.terminate()
        agent.wait()
    return group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 20))
    parser.add_argument("--folder", type=Path, help="where the two runs are kept; a temporary one without it")
    parser.add_argument("overrides", nargs="*", help="options of train.py")
    asked = parser.parse_args()
    import tiny
    from conftest import make_world

    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tiny.make_pipeline(tiny.make_family("v_prediction", zero_snr=True)).save_pretrained(folder / "base")
        world = make_world(folder / "world", str(folder / "base"), tiny.save_clip(folder / "clip"))
        start = time.monotonic()
        group = torture(folder, [*world.overrides(), *asked.overrides], asked.kills, asked.seed)
        found = differences(folder / "decoupled_global/whole", folder / "decoupled_global/tortured")
        per_rank = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(group.of_rank))
        print(
            f"{group.kills} kills ({per_rank}), {group.within_checkpoint} of them within a checkpoint; {STEPS} steps "
            f"on {RANKS} ranks × {WORKERS} data workers; seed {asked.seed}; {time.monotonic() - start:.0f} s"
        )
        print("the same bit for bit" if not found else "DIFFERENT: " + "; ".join(found))
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
