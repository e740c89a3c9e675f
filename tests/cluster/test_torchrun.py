"""Several nodes without Slurm: torchrun on each of two network namespaces, which can be killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import Node, TwoNodes, missing
from slurm import wait_until
from trainings import EVERY_STEPS, PATIENCE_S, STEPS, TinyRuns, newest_step, steps_made, wait_for_step

ROOT = Path(__file__).resolve().parents[2]
PORT = 29411


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with TwoNodes() as nodes:
        yield nodes


def start(node: Node, first: Node, tiny_runs: TinyRuns) -> subprocess.Popen[bytes]:
    """As docs/cluster.md has it, but for the addresses, which no name server knows here."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=9"),
        *("--rdzv-backend=c10d", "--rdzv-id=two-nodes", f"--rdzv-endpoint={first.address}:{PORT}"),
        *(f"--local-addr={node.address}", f"--rdzv-conf=is_host={node is first}"),
        *("train.py", "trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2"),
    ]
    log = tiny_runs.folder / f"{node.address}.log"
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return node.start([*command, *tiny_runs.overrides], log, ROOT, **variables)


def told(tiny_runs: TinyRuns) -> str:
    return "\n".join(path.read_text() for path in sorted(tiny_runs.folder.glob("*.log")))


@pytest.mark.slow
def test_run_survives_the_death_of_a_process_and_of_a_node(nodes: list[Node], tiny_runs: TinyRuns) -> None:
    """torchrun restarts after the death of a process; a node that died is given torchrun once more, and joins again."""
    first, second = nodes
    run = tiny_runs.folder / "runs/decoupled_global/two-nodes"
    torchruns = [start(node, first, tiny_runs) for node in nodes]
    wait_for_step(run, EVERY_STEPS)
    assert second.kill(only="-u train.py") > 0
    wait_for_step(run, newest_step(run) + 2 * EVERY_STEPS)
    assert [process.poll() for process in torchruns] == [None, None], told(tiny_runs)

    second.kill()
    torchruns[1].wait()
    assert second.processes() == {} and newest_step(run) < STEPS
    torchruns[1] = start(second, first, tiny_runs)

    wait_until(lambda: None not in [process.poll() for process in torchruns], "the end of both", PATIENCE_S)
    assert [process.returncode for process in torchruns] == [0, 0], told(tiny_runs)
    assert steps_made(run) == STEPS
