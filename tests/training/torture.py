"""Kill -9 of a random rank at random moments under torchrun, which starts the group anew; nothing may be lost.

Two ranks with two data workers each train. Every second kill waits for a checkpoint that is being written.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent

RANKS, WORKERS = 2, 2
STEPS, EVERY = 1000, 5  # of the whole run, and between checkpoints
PATIENCE_S = 180  # for a restarted group to write a checkpoint
OPTIONS = (
    *("preview.num_prompts=1", "preview.num_scored=1", "preview.every_n_steps=500", "scoring=null"),
    *(f"trainer.max_steps={STEPS}", f"checkpoint.every_n_steps={EVERY}", f"data.num_workers={WORKERS}"),
    *("trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={RANKS}", "ema.decay=0.99", "~logger.wandb"),
)


def torchrun(folder: Path, name: str, options: Sequence[str], restarts: int) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command = [*launcher, f"--max-restarts={restarts}", "--monitor-interval=0.2", str(ROOT / "train.py")]
    run = [*options, f"paths.runs={folder}", f"name={name}"]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}", "XDG_CACHE_HOME": str(folder / "cache")}
    output = (folder / f"{name}.log").open("ab")
    return subprocess.Popen([*command, *run], stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **own})


class Group:
    """The run that is tortured."""

    def __init__(self, agent: subprocess.Popen[bytes], checkpoints: Path) -> None:
        self.agent, self.checkpoints, self.kills = agent, checkpoints, 0

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
            assert self.agent.poll() is None, f"the run ended (code {self.agent.returncode}) after {self.kills} kills"
            assert time.monotonic() < until, f"no progress within {PATIENCE_S} s after {self.kills} kills"
            time.sleep(pause_s)

    def kill_one(self, within_checkpoint: bool) -> None:
        before = self.steps()
        self.wait_for(lambda: self.steps() > before and len(self.ranks()) == RANKS, 0.05)
        victim = self.ranks()[random.randrange(RANKS)]
        time.sleep(random.uniform(0, 0.8))
        if within_checkpoint:
            self.wait_for(self.begun, 0)
        os.kill(victim.pid, signal.SIGKILL)
        self.kills += 1
        victim.wait()


def torture(folder: Path, world: Sequence[str], kills: int) -> tuple[Path, Path]:
    """The folders of a run that nobody disturbed, and of one that was killed so often and came to its end."""
    options = [*world, *OPTIONS]
    assert torchrun(folder, "whole", options, 0).wait() == 0, (folder / "whole.log").read_text()
    agent = torchrun(folder, "tortured", options, kills + 5)
    group = Group(agent, folder / "decoupled_global/tortured/checkpoints")
    try:
        for number in range(kills):
            group.kill_one(within_checkpoint=number % 2 == 1)
        assert agent.wait() == 0, (folder / "tortured.log").read_text()
    finally:
        agent.terminate()
        agent.wait()
    return folder / "decoupled_global/whole", folder / "decoupled_global/tortured"
