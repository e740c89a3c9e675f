"""What pairs cost: the index of a million samples, its memory in a worker, and a partner from the feature cache.

    python benchmarks/pairs.py                    # writes benchmarks/pairs.md and pairs.json; 3 GB of temporary files
    python benchmarks/pairs.py --samples 20000    # a trial

100 shards with members of a few bytes, so that the index and not the disk is measured: 100,000 groups in two levels.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import write_cache
from measuring import save, table
from PIL import Image
from tqdm import tqdm

from ipa.data.addresses import Address
from ipa.data.cache.preparation import CachedPreparation, lent_arrays
from ipa.data.cache.source import CacheSource
from ipa.data.pairs.building import build_index, list_jobs
from ipa.data.pairs.index import Place, open_index
from ipa.data.pairs.options import Pairs
from ipa.data.pairs.partners import Partners
from ipa.data.records import Record
from ipa.data.shards.source import ShardSource

CACHED = 1024  # samples in each of two shards, 280 MB: the lookup reads from the page cache
STEP_SAMPLES_PER_S = 2000
LOOKUPS, ROUNDS = 20_000, 5
PAIRS = Pairs.of({"by": ["character", "franchise"]})


def write_shard(number: int, folder: Path, samples: int) -> str:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    picture, draw = out.getvalue(), np.random.default_rng(number)
    with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
        for i, character in enumerate(draw.integers(0, 90_000, samples).tolist()):
            entry = {"character": f"character {character}", "franchise": f"franchise {character % 10_000}"}
            content = {"json": json.dumps(entry).encode(), "png": picture, "txt": b"a picture"}
            for extension, data in content.items():
                info = tarfile.TarInfo(f"{number:05d}{i:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder / f"{number:05d}.tar")


def memory_mb() -> dict[str, float]:
    """Of this process alone: the pages of the mapped index belong to the page cache, which all workers share."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {name: round(int(lines[name].split()[0]) / 1024, 1) for name in ("Anonymous", "Rss")}


def watch(partners: Partners, samples: int, send: Any) -> None:
    """Memory of a worker before it reads, and after every ``LOOKUPS`` partners that it reads from all shards."""
    draw, found = np.random.default_rng(0), [memory_mb()]
    for _ in range(ROUNDS):
        for row in draw.integers(0, samples, LOOKUPS).tolist():
            partners.read(partners.index.place(partners.index.partner(row, row * 7919)))
        found.append(memory_mb())
    send.send(found)


def microseconds(way: Callable[[int], object]) -> dict[str, float]:
    """Processor time of a call: median, lowest and highest of the rounds."""
    rounds = []
    for number in range(ROUNDS + 1):
        started = time.process_time()
        for i in range(LOOKUPS):
            way(number * LOOKUPS + i)
        rounds.append((time.process_time() - started) / LOOKUPS * 1e6)
    rounds = sorted(rounds[1:])  # the first one warms up
    return {"median": rounds[len(rounds) // 2], "lowest": rounds[0], "highest": rounds[-1]}


def records_of(source: ShardSource) -> Iterator[Record]:
    for shard in source.shards:
        for found in source.read(shard):
            assert isinstance(found, Record)
            found.source = source.name
            yield found


def lookup(partners: Partners, folder: Path) -> dict[str, dict[str, float]]:
    """Choosing a partner among all samples, and reading its features: 512 px of SD 1.5, of which 2 KB are needed."""
    records = [record for _, record in zip(range(LOOKUPS), records_of(partners.sources[0]), strict=False)]
    cache = CacheSource.of(write_cache(folder, 2, CACHED))
    cached = [found for shard in cache.shards for found in cache.read(shard) if isinstance(found, Record)]
    for record in cached:
        record.source = cache.name
    sizes = [(record.shard, record.index, record.span[0], record.span[1] - record.span[0]) for record in cached]
    places = [Place(cache.name, *size, key=1) for size in sizes]
    reading, preparation = Partners(partners.path, 0, [cache]), CachedPreparation()
    own = preparation.sample(cached[0], Address(0, 0, "train", "", 0)).arrays

    def address(number: int, record: Record) -> Address:
        return Address(0, number, record.source, record.shard, record.index)

    return {
        "choose a partner": microseconds(lambda n: partners.choose(r := records[n % len(records)], address(n, r))),
        "read its embedding": microseconds(lambda n: lent_arrays(places[n * 7919 % len(places)], own, reading)),
        "(a sample from the cache, without its noise)": microseconds(
            lambda n: preparation.sample(r := cached[n % len(cached)], address(n, r))
        ),
    }


def measure(folder: Path, shards: int, samples: int) -> dict[str, Any]:
    workers = len(os.sched_getaffinity(0))
    (folder / "pictures").mkdir()
    with ProcessPoolExecutor(workers) as pool:
        make = partial(write_shard, folder=folder / "pictures", samples=samples // shards)
        source = ShardSource.of("train", shards=list(pool.map(make, range(shards))))
    path, started = folder / "index", time.perf_counter()
    with tqdm(total=shards, desc="shards", mininterval=5) as bar:
        about = build_index(list_jobs([source]), PAIRS, path, workers, bar.update)
    build_s = time.perf_counter() - started
    partners = Partners(str(path), 0, [source])
    open_index(str(path))
    receive, send = multiprocessing.Pipe()
    worker = multiprocessing.Process(target=watch, args=(partners, samples, send))
    worker.start()
    memory = receive.recv()
    worker.join()
    return {
        "samples": samples,
        "shards": shards,
        "workers": workers,
        "build_s": build_s,
        "load": os.getloadavg()[0],
        "index_mb": path.stat().st_size / 1e6,
        "report": about["report"],
        "memory_mb": memory,
        "us": lookup(partners, folder / "cache"),
    }


def in_markdown(found: dict[str, Any]) -> str:
    us = found["us"]
    lookup_us = sum(us[name]["median"] for name in list(us)[:2])
    rows = [
        (name, f"{each['median']:.1f}", f"{each['lowest']:.1f} – {each['highest']:.1f}") for name, each in us.items()
    ]
    anonymous = [each["Anonymous"] for each in found["memory_mb"]]
    memory = ", ".join(f"{mb:.1f}" for mb in anonymous)
    return "\n".join(
        [
            f"The index of {found['samples']:,} samples in {found['shards']} shards took {found['build_s']:.0f} s with "
            f"{found['workers']} processes (load {found['load']:.1f}); it has {found['index_mb']:.0f} MB. "
            f"{found['report']['alone']:,} samples have no partner.",
            "",
            f"Memory of a worker (anonymous, MB) before it reads and after every {LOOKUPS:,} partners: {memory}.",
            "",
            table(["µs of processor time", "median", "lowest – highest"], rows),
            "",
            f"A partner takes {lookup_us:.1f} µs, {lookup_us * STEP_SAMPLES_PER_S / 1e4:.1f} % of a step at "
            f"{STEP_SAMPLES_PER_S:,} samples/s.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), options.shards, options.samples)
    save("pairs", found, in_markdown(found))


if __name__ == "__main__":
    main()
