"""The first half of an evaluation: generates images and writes each one once, as `ipa.evaluation.report.reading` says.

Batches are a fixed partition of the plan. An unfinished batch is repeated as a whole, since rounding depends on the
batch size; so restarts, order and the number of processes change no bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ipa.data.images.transforms import to_tensor
from ipa.errors import UserError
from ipa.evaluation.benchmarks import Benchmark, Item, Task
from ipa.evaluation.methods.method import Method, Prompt
from ipa.files import read_json, write_atomically, write_json
from ipa.sampling import SamplingOptions
from ipa.types import first_not_finite, to_uint8

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "torchmetrics")
THUMBNAIL_PX = 256
UNANNOUNCED_STEPS = 200  # more steps in total start with an estimate on a CPU, which takes eight more
COMPLETE, UNFINISHED, SKIPPED = "complete", "unfinished", "skipped"
Read = Callable[[Item], Tensor]


def write_items(folder: Path, benchmark: Benchmark, items: Sequence[Item], num_seeds: int) -> None:
    """Write items.json and thumbnails of the image prompts; raises UserError if the folder has other settings."""
    settings = {
        "benchmark": {"name": benchmark.name, "settings": benchmark.settings},
        "num_seeds": num_seeds,
        "items": [
            {"id": item.id, "captions": list(item.captions), "reference": f"references/{item.id}.png"} for item in items
        ],
    }
    path = folder / "items.json"
    before = read_json(path) if path.is_file() else settings
    if differ := [name for name in settings if before.get(name) != settings[name]]:
        raise UserError(
            f"{folder} holds results with different settings ({', '.join(differ)}): give another folder, out=FOLDER"
        )
    for item in items:
        thumbnail = folder / "references" / f"{item.id}.png"
        if not thumbnail.is_file():
            picture = to_picture(benchmark.read(item))
            picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            write_png(thumbnail, picture)
    write_json(path, settings)


def identity(benchmark: Benchmark) -> dict[str, Any]:
    """The manifest's record of its benchmark, which detects a folder that was moved to another benchmark."""
    return {"name": benchmark.name, "fingerprint": benchmark.settings.get("fingerprint")}


def recorded(sampling: SamplingOptions) -> dict[str, Any]:
    """The options in a manifest, without the batch size, which has its own entry."""
    return {name: value for name, value in asdict(sampling).items() if name != "batch_size"}


def manifest(
    label: str, benchmark: Benchmark, method: Method, sampling: SamplingOptions, tasks: Sequence[Task], **settings: Any
) -> dict[str, Any]:
    """Everything that determines the images."""
    about = {name: getattr(method, name) for name in ("name", "source", "trained", "uses_text")}
    return {
        "label": label,
        "benchmark": identity(benchmark),
        "method": {**about, **method.recorded},
        "sampling": recorded(sampling),
        **settings,
        "batch_size": sampling.batch_size,
        "pictures": planned(tasks),
    }


def planned(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    return [
        {"item": task.item.id, "number": task.number, "seed": task.seed, "text": task.text, "file": task.file}
        for task in tasks
    ]


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Write the manifest, unless the run is complete. Raises UserError for images made with other, or no, settings."""
    path = folder / "manifest.json"
    before = read_json(path) if path.is_file() else {}
    if "pictures" in before:
        refuse_mix(folder, before, json.loads(json.dumps(settings)))
    elif any((folder / "pictures").glob("**/*.png")):
        raise UserError(
            f"{folder} holds images without a manifest of how they were made: give label=ANOTHER or remove it"
        )
    if before.get("status") != COMPLETE or not all((folder / each["file"]).is_file() for each in settings["pictures"]):
        spent = {"seconds": before["seconds"]} if "seconds" in before else {}
        versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
        write_json(path, {**settings, "status": UNFINISHED, "versions": versions, **spent})


def refuse_mix(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError for other settings. Sampling options that are newer than the manifest had their defaults."""
    before = {**before, "sampling": {**recorded(SamplingOptions()), **before.get("sampling", {})}}
    if differ := sorted(name for name in now if before.get(name) != now[name]):
        changes = [f"{name}: {json.dumps(before.get(name)):.80}, now {json.dumps(now[name]):.80}" for name in differ]
        raise UserError(
            f"{folder} holds images with other settings ({', '.join(changes)}): give label=ANOTHER or remove it"
        )


def check_made(folder: Path, benchmark: Benchmark, tasks: Sequence[Task]) -> None:
    """For generate=false: raises UserError unless all these images of this benchmark are there."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"generate=false, but {folder} has no images yet: give another label=, or generate=true")
    refuse_mix(folder, read_json(path), {"benchmark": identity(benchmark), "pictures": planned(tasks)})
    if missing := [task.file for task in tasks if not (folder / task.file).is_file()]:
        raise UserError(
            f"generate=false, but {len(missing)} of {len(tasks)} images are not in {folder} ({missing[0]} …): give "
            "generate=true, or remove the folder"
        )


def batches(tasks: Sequence[Task], batch_size: int) -> list[Sequence[Task]]:
    return [tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size)]


def generate(
    folder: Path, method: Method, tasks: Sequence[Task], read: Read, sampling: SamplingOptions, rank: int, world: int
) -> None:
    """Make the missing images of this process's batches, which are every ``world``-th."""
    mine = [batch for batch in batches(tasks, sampling.batch_size)[rank::world] if not is_done(folder, batch)]
    total = sum(map(len, mine))
    if total * sampling.num_steps >= UNANNOUNCED_STEPS and next(method.parameters()).device.type == "cpu":
        announce(folder.name, method, Prompt(read(mine[0][0].item), mine[0][0].text, 0), sampling, total)
    with tqdm(total=total, unit=" images", desc=folder.name, disable=not total) as bar:
        for batch in mine:
            pixels_B3HW = method.generate([Prompt(read(task.item), task.text, task.seed) for task in batch], sampling)
            check_finite(pixels_B3HW, folder.name)
            for task, pixels_3HW in zip(batch, to_uint8(pixels_B3HW), strict=True):
                write_png(folder / task.file, to_picture(pixels_3HW))
            bar.update(len(batch))


def announce(label: str, method: Method, prompt: Prompt, sampling: SamplingOptions, count: int) -> None:
    """Log how long ``count`` images take, extrapolated from one of few steps; batches take less."""

    def seconds(num_steps: int) -> float:
        started = time.perf_counter()
        method.generate([prompt], replace(sampling, num_steps=num_steps))
        return time.perf_counter() - started

    _, two, four = (seconds(num_steps) for num_steps in (2, 2, 4))  # the first call warms up
    minutes = count * (two + (sampling.num_steps - 2) * max(four - two, 0) / 2) / 60
    if minutes >= 1:
        log.warning(
            "%s: %d images of %d steps take up to %.0f minutes on this CPU. For fewer: num_seeds=, benchmark.limit=, "
            "sampling.num_steps=",
            *(label, count, sampling.num_steps, minutes),
        )


def check_finite(pixels_B3HW: Tensor, label: str) -> None:
    """Raise UserError for pixels that overflowed, as half precision can; a PNG would show them black."""
    if broken := first_not_finite({label: pixels_B3HW}):
        raise UserError(
            f"{label}: image {broken[1]} of a batch is not finite. If the system runs in half precision, give "
            "method.dtype=float32"
        )


def is_done(folder: Path, batch: Sequence[Task]) -> bool:
    return all((folder / task.file).is_file() for task in batch)


def finish(folder: Path, tasks: Sequence[Task], seconds: float, device: str) -> bool:
    """Mark the run complete if all images of all processes are there."""
    if not is_done(folder, tasks):
        return False
    path = folder / "manifest.json"
    content = read_json(path)
    if content["status"] != COMPLETE:
        seconds += content.get("seconds", 0.0)
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
        done = {"status": COMPLETE, "device": name or platform.machine(), "seconds": round(seconds, 1)}
        write_json(path, {**content, **done})
        for temporary in folder.rglob(".*.tmp"):  # left by killed processes
            temporary.unlink(missing_ok=True)
    return True


def skip(folder: Path, label: str, name: str, reason: str) -> bool:
    """Record for the report why a system could not run; False if the folder has images, which are kept."""
    if (folder / "pictures").is_dir():
        return False
    content = {"label": label, "method": {"name": name}, "status": SKIPPED, "reason": reason}
    write_json(folder / "manifest.json", content)
    return True


def pictures_hash(folder: Path, tasks: Sequence[Task]) -> str:
    """SHA-256 of all images, to tell whether scores belong to them."""
    whole = hashlib.sha256()
    for task in tasks:
        whole.update((folder / task.file).read_bytes())
    return whole.hexdigest()


def read_pictures(folder: Path, tasks: Sequence[Task], batch_size: int) -> Iterator[tuple[Sequence[Task], Tensor]]:
    """The written images, batch by batch: uint8 pictures_B3HW."""
    for batch in batches(tasks, batch_size):
        yield batch, torch.stack([read_png(folder / task.file) for task in batch])


def to_picture(pixels_3HW: Tensor) -> Image.Image:
    return Image.fromarray(pixels_3HW.permute(1, 2, 0).contiguous().numpy())


def write_png(path: Path, picture: Image.Image) -> None:
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def read_png(path: Path) -> Tensor:
    """uint8 picture_3HW."""
    with Image.open(path) as picture:
        return to_tensor(picture.convert("RGB"))
