"""How fast samples come: our stream, a feature cache, and a plain PIL + torchvision + CLIPImageProcessor dataset.

    python benchmarks/data.py                     # or make bench-data; writes benchmarks/data.md and data.json

Each runs in one process with one thread, on the same pictures: 1024 px JPEGs, a 512 px target, a 224 px reference. They
take turns, so that a disturbance meets all; the table has the median of the rounds. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
import transformers
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import CLIPImageProcessor

from ipa.data.addresses import DropRates
from ipa.data.cache.format import CacheWriter, Header
from ipa.data.cache.preparation import CachedPreparation
from ipa.data.cache.source import CacheSource
from ipa.data.images.preparation import ImagePreparation
from ipa.data.order.sequence import Order
from ipa.data.order.streams import TrainStream
from ipa.data.records import Record
from ipa.data.shards.source import ShardSource

HERE = Path(__file__).parent
PICTURE_PX, IMAGE_PX, REFERENCE_PX, LATENT = 1024, 512, 224, (4, 64, 64)
BATCH = 8


def photo(seed: int, size_px: int = PICTURE_PX) -> bytes:
    """Noise that costs a decoder what a photograph costs: amplitude ∝ f^-1.7, JPEG quality 90, about 200 KB at 1024 px.

    Thirteen photographs that were shrunk to 1024 px had 87 to 214 KB; plain 1/f noise has 650.
    """
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None]) + 1 / size_px
    noise = [np.fft.rfft2(draw.standard_normal((size_px, size_px))) for _ in range(3)]
    planes = [np.fft.irfft2(plane / frequency**1.7) for plane in noise]
    grey, *colours = [plane / plane.std() for plane in planes]
    pixels = np.stack([grey, grey + 0.3 * colours[0], grey + 0.3 * colours[1]], -1) * 50 + 128
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_shard(path: Path, samples: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, picture in samples:
            for name, content in ((f"{key}.jpg", picture), (f"{key}.txt", f"photograph {key}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_pictures(folder: Path, shards: int, samples: int, pictures: list[bytes]) -> list[str]:
    """Shards in which these pictures come round, captions beside; and the pictures as files, for the plain dataset."""
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        (files / f"{i:04d}.jpg").write_bytes(picture)
    names = [folder / f"{shard:05d}.tar" for shard in range(shards)]
    for shard, name in enumerate(names):
        numbers = range(shard * samples, (shard + 1) * samples)
        write_shard(name, [(f"{number:09d}", pictures[number % len(pictures)]) for number in numbers])
    return [str(name) for name in names]


def plain(folder: Path) -> Iterator[int]:
    """What the public training script does for a sample, picture by picture."""
    processor = CLIPImageProcessor()
    to_target = v2.Compose(
        [
            v2.Resize(IMAGE_PX, interpolation=v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(IMAGE_PX),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.5]),
        ]
    )
    while True:
        for path in sorted((folder / "files").iterdir()):
            picture = Image.open(path).convert("RGB")
            to_target(picture)
            processor(images=picture, return_tensors="pt")
            yield 1


def stream(shards: list[str]) -> Iterator[int]:
    """Our training batches, their noise and drops included."""
    order = Order([ShardSource.of("train", shards=shards)], seed=0, window=64)
    preparation = ImagePreparation(IMAGE_PX, REFERENCE_PX, LATENT, DropRates())
    for batch in TrainStream(order, preparation, BATCH):
        yield len(batch)


def rate(batches: Iterator[int], seconds: float) -> float:
    """Samples per second over at least so many seconds."""
    samples, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        samples += next(batches)
    return samples / spent


def compare(ways: dict[str, Iterator[int]], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Way → median, lowest and highest samples per second; the ways take turns."""
    for batches in ways.values():
        next(batches)  # windows are filled, caches are warm
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, batches in ways.items():
            rates[name].append(rate(batches, seconds))
    return {
        name: {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}
        for name, each in rates.items()
    }


def pss_mb(pid: int) -> float:
    """Proportional set size of a process: its own memory, and its part of what is shared."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def memory(folder: Path, shards: int = 200, samples: int = 1000) -> dict[str, float]:
    """Shards read → PSS in MB of the only data worker, every 20 shards."""
    small = [photo(seed, 64) for seed in range(64)]
    names = write_pictures(folder, shards, samples, small)
    order = Order([ShardSource.of("train", shards=names)], seed=0)
    stream = TrainStream(order, ImagePreparation(64, 64, (4, 8, 8), DropRates()), 50)
    loader = DataLoader(stream, batch_size=None, num_workers=1)
    seen = {}
    with tqdm(total=shards, desc="shards of a worker") as bar:
        for number, _ in enumerate(loader, 1):
            if number * 50 % (20 * samples) == 0:
                [worker] = multiprocessing.active_children()
                seen[str(number * 50 // samples)] = round(pss_mb(worker.pid or 0), 1)
                bar.update(20)
            if number * 50 == shards * samples:
                return seen
    raise AssertionError("the stream is endless")


START_UP = """
import time
from ipa.data.datamodule import ShardDataModule
from ipa.data.order.lanes import Lane
from ipa.data.order.sequence import LaneOrder
started = time.perf_counter()
data = ShardDataModule("https://host/{000000..099999}.tar", num_workers=8)
data.fit_to(image_size_px=512, reference_size_px=224, latent_shape=(4, 64, 64))
loader = data.train_dataloader()
first = LaneOrder(data.train_order, Lane(0, 8), 1).shards(data.train_order.sources[0], 0)[0]
state = data.state_dict()
print(time.perf_counter() - started)
"""


def start_up() -> float:
    """Seconds from the end of the imports to the first name that a reader opens, for a list of 100,000 shards."""
    out = subprocess.run([sys.executable, "-c", START_UP], capture_output=True, text=True, check=True).stdout
    return float(out.split()[-1])


def write_cache(folder: Path, shards: int, samples: int) -> list[str]:
    """Feature shards of SD 1.5 at 512 px for the global head; random numbers take as long to read as any."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    header = Header("train", sizes={"latent_shape": list(LATENT)})
    for shard in range(shards):
        with (folder / f"{shard:05d}.tar").open("wb") as file:
            writer = CacheWriter(file, header)
            for i in range(samples):
                record = Record(
                    f"{shard:05d}{i:04d}", "", i, b"", (("a photograph of a thing", 1.0),), measured=(1024, 1024)
                )
                tensors = {
                    "mean_CHW": torch.randn(LATENT, generator=draw),
                    "logvar_CHW": torch.randn(LATENT, generator=draw),
                    "pooled_E": torch.randn(1024, generator=draw),
                    "text.ids": torch.randint(49408, (1, 77), generator=draw),
                    "size_6": torch.tensor([1024, 1024, 0, 0, IMAGE_PX, IMAGE_PX]),
                }
                writer.sample(record, tensors, None)
            writer.close({})
    return [str(folder / f"{shard:05d}.tar") for shard in range(shards)]


def cached(shards: list[str]) -> Iterator[int]:
    """Training batches from the cache, their noise and drops included."""
    order = Order([CacheSource.of(shards)], seed=0, window=512)
    for batch in TrainStream(order, CachedPreparation(), BATCH):
        yield len(batch)


def versions() -> str:
    names = {"torch": torch, "torchvision": torchvision, "transformers": transformers, "pillow": PIL, "numpy": np}
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    libraries = ", ".join(f"{name} {module.__version__}" for name, module in names.items())
    return f"{processor}, {os.cpu_count()} cores; Python {platform.python_version()}, {libraries}"


def in_markdown(found: dict[str, Any]) -> str:
    rates = found["rates"]
    rows = [
        f"| {name} | {each['median']:,.0f} | {each['lowest']:,.0f} – {each['highest']:,.0f} "
        f"| {each['median'] / rates['plain']['median']:.1f} |"
        for name, each in rates.items()
    ]
    parts = [
        "Made by `make bench-data`. One process with one thread each; 1024 px JPEGs (about 200 KB) to a",
        f"512 px target and a 224 px reference. {found['date']}, {found['environment']}.",
        "",
        "| | samples/s (median) | lowest – highest | × plain |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Start-up with 100,000 shard names: {found['start_up_s']:.2f} s beyond the imports.",
    ]
    if found["pss_mb"]:
        table = ", ".join(f"{shards}: {mb:.0f}" for shards, mb in found["pss_mb"].items())
        parts += ["", f"Memory of a data worker (PSS in MB) after so many shards of 1,000 samples: {table}."]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of each way in each round")
    parser.add_argument(
        "--memory", action="store_true", help="also read 200 shards of 1,000 samples and watch a worker"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_pictures(folder / "photos", 2, 128, [photo(seed) for seed in tqdm(range(64), desc="pictures")])
        ways = {
            "plain": plain(folder / "photos"),
            "stream": stream(shards),
            "feature cache": cached(write_cache(folder / "cache", 2, 1024)),
        }
        found = {
            "date": f"{time.strftime('%Y-%m-%d')}",
            "environment": versions(),
            "rates": compare(ways, options.rounds, options.seconds),
            "start_up_s": start_up(),
            "pss_mb": memory(folder / "small") if options.memory else {},
        }
    (HERE / "data.json").write_text(json.dumps(found, indent=2) + "\n")
    (HERE / "data.md").write_text(in_markdown(found))
    print(in_markdown(found))


if __name__ == "__main__":
    main()
