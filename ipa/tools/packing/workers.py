"""Shards are written by processes of their own, which say of every sample when it is done."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from ipa.errors import UserError
from ipa.tools.packing.shards import Shard

POLL_S = 0.2
counter: Any = None  # in a worker: the samples that all workers have done


def write_shards(shards: Sequence[Shard], workers: int) -> None:
    """Write them all, with a progress bar; raises UserError for the first that cannot be written.

    ``workers`` is how many pictures are worked on at once. Where shards are fewer, their processes have threads.
    """
    if not shards:
        return
    shared = multiprocessing.Value("q", 0)
    processes = min(workers, len(shards))
    with ProcessPoolExecutor(processes, initializer=begin, initargs=(shared,)) as pool:
        waiting = {pool.submit(write, shard, math.ceil(workers / processes)) for shard in shards}
        total = sum(len(shard.samples) for shard in shards)
        try:
            # the bar has a thread of its own, and processes are better forked before
            with tqdm(total=total, unit=" pictures", desc=f"shards: {len(shards)}") as bar:
                while waiting:
                    finished, waiting = wait(waiting, POLL_S, FIRST_COMPLETED)
                    bar.update(shared.value - bar.n)
                    for future in finished:
                        future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was ended from outside, perhaps since memory ran out: try fewer with workers=N. What is "
                "whole is kept, the same command goes on."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def begin(shared: Any) -> None:
    """In a worker: Ctrl-C ends it without a word, and so does the end of the process that started it."""
    global counter
    counter = shared
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.filterwarnings("ignore", module="PIL")  # threads get into each other's way when they do so by themselves
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def write(shard: Shard, threads: int) -> None:
    shard.write(threads, count_one)


def count_one() -> None:
    with counter.get_lock():
        counter.value += 1
