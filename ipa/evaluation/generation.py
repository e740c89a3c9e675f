"""The first half of an evaluation: pictures, written one by one and never made twice.

    FOLDER/items.json, references/ID.png      what is asked, for every system the same
    FOLDER/LABEL/manifest.json                how a system was run
    FOLDER/LABEL/pictures/ITEM_NUMBER.png     what came out

Pictures are made in batches, which are a fixed partition of the plan. An unfinished batch is made again as a whole,
since processors round differently at other batch sizes: so restarts, order and the number of processes change no bit.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ipa.data.images.transforms import to_tensor
from ipa.errors import UserError
from ipa.evaluation.items import Benchmark, Item, Task
from ipa.evaluation.methods.method import Method, Prompt, Sampling
from ipa.files import read_json, write_atomically, write_json
from ipa.types import to_uint8

LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "torchmetrics")
THUMBNAIL_PX = 256
COMPLETE, UNFINISHED, SKIPPED = "complete", "unfinished", "skipped"


def write_picture(path: Path, pixels_3HW: Tensor) -> None:
    """uint8 picture → PNG."""
    picture = Image.fromarray(pixels_3HW.permute(1, 2, 0).contiguous().numpy())
    write_atomically(path, lambda beside: picture.save(beside, format="PNG"))


def read_png(path: Path) -> Tensor:
    """uint8 picture_3HW."""
    with Image.open(path) as picture:
        return to_tensor(picture.convert("RGB"))


def write_items(folder: Path, benchmark: Benchmark, items: Sequence[Item], num_seeds: int) -> None:
    """What is asked, and thumbnails of the image prompts; raises UserError if the folder holds another question."""
    asked = {
        "benchmark": {"name": benchmark.name, "settings": benchmark.settings},
        "num_seeds": num_seeds,
        "items": [
            {"id": item.id, "captions": list(item.captions), "reference": f"references/{item.id}.png"} for item in items
        ],
    }
    path = folder / "items.json"
    before = read_json(path) if path.is_file() else asked
    if differ := [name.replace("_", " ") for name in asked if before.get(name) != asked[name]]:
        raise UserError(
            f"{folder} holds an evaluation of another question ({', '.join(differ)}): say out=ANOTHER_FOLDER"
        )
    for item in items:
        thumbnail = folder / "references" / f"{item.id}.png"
        if not thumbnail.is_file():
            write_thumbnail(thumbnail, benchmark.read(item))
    write_json(path, asked)


def identity(benchmark: Benchmark) -> dict[str, Any]:
    """What a manifest says of its benchmark, so that a folder that was moved to another's is noticed."""
    return {"name": benchmark.name, "fingerprint": benchmark.settings.get("fingerprint")}


def manifest(
    label: str,
    benchmark: Benchmark,
    method: Method,
    sampling: Sampling,
    tasks: Sequence[Task],
    batch_size: int,
    **settings: Any,
) -> dict[str, Any]:
    """All that decides what the pictures look like, and what made them."""
    return {
        "label": label,
        "benchmark": identity(benchmark),
        "method": {
            "name": method.name,
            "source": method.source,
            "trained": method.trained,
            "uses_text": method.uses_text,
        },
        "sampling": asdict(sampling),
        **settings,
        "batch_size": batch_size,
        "pictures": listed(tasks),
    }


def listed(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    return [
        {"item": task.item.id, "number": task.number, "seed": task.seed, "text": task.text, "file": task.file}
        for task in tasks
    ]


def write_thumbnail(path: Path, image_3HW: Tensor) -> None:
    picture = Image.fromarray(image_3HW.permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    write_atomically(path, lambda beside: picture.save(beside, format="PNG"))


# what may differ between the starts of one run
OF_THE_RUN = ("status", "versions", "device", "seconds", "reason")


def begin(folder: Path, asked: dict[str, Any]) -> None:
    """Write the manifest, or leave that of a run that is complete.

    Raises UserError when the folder holds pictures of other settings, or such that nothing is known of.
    """
    path = folder / "manifest.json"
    before = read_json(path) if path.is_file() else {}
    if "pictures" in before:
        refuse_mix(folder, before, json.loads(json.dumps(asked)))
    elif any((folder / "pictures").glob("**/*.png")):
        raise UserError(
            f"{folder} holds pictures without a manifest of how they were made: say label=ANOTHER or remove it"
        )
    if before.get("status") != COMPLETE or not all((folder / each["file"]).is_file() for each in asked["pictures"]):
        spent = {"seconds": before["seconds"]} if "seconds" in before else {}
        write_json(path, {**asked, "status": UNFINISHED, "versions": versions(), **spent})


def refuse_mix(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError that names the settings of ``now`` in which the folder's manifest differs."""
    if differ := sorted(name for name in now if before.get(name) != now[name]):
        told = ", ".join(f"{name}: {brief(before.get(name))}, now {brief(now[name])}" for name in differ)
        raise UserError(f"{folder} holds pictures of other settings ({told}): say label=ANOTHER or remove it")


def check_made(folder: Path, benchmark: Benchmark, tasks: Sequence[Task]) -> None:
    """For scores alone: raises UserError unless all these pictures of this benchmark are there."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"generate=false, but {folder} has no pictures yet: say label=, or let them be made")
    refuse_mix(folder, read_json(path), {"benchmark": identity(benchmark), "pictures": listed(tasks)})
    missing = [task.file for task in tasks if not (folder / task.file).is_file()]
    if missing:
        raise UserError(
            f"generate=false, but {len(missing)} of {len(tasks)} pictures are not in {folder} ({missing[0]} …): let "
            "them be made, or remove the folder"
        )


def brief(value: Any) -> str:
    words = json.dumps(value)
    return words if len(words) <= 80 else f"{words[:77]}…"


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def batches(tasks: Sequence[Task], batch_size: int) -> list[Sequence[Task]]:
    return [tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size)]


def generate(
    folder: Path,
    method: Method,
    tasks: Sequence[Task],
    read: Callable[[Item], Tensor],
    sampling: Sampling,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
) -> int:
    """Make what is missing of this process's batches, every ``world``-th; returns how many pictures were made."""
    made = 0
    mine = [batch for batch in batches(tasks, batch_size)[rank::world] if not is_done(folder, batch)]
    total = sum(map(len, mine))
    with tqdm(total=total, unit=" pictures", desc=folder.name, disable=not total) as bar:
        for batch in mine:
            prompts = [Prompt(read(task.item), task.text, task.seed) for task in batch]
            pixels_B3HW = method.generate(prompts, sampling)
            check_finite(pixels_B3HW, folder.name)
            for task, pixels_3HW in zip(batch, to_uint8(pixels_B3HW), strict=True):
                write_picture(folder / task.file, pixels_3HW)
            made += len(batch)
            bar.update(len(batch))
    return made


def check_finite(pixels_B3HW: Tensor, label: str) -> None:
    """Raises UserError for what a network in half precision gives when it overflows, and a PNG would show as black."""
    broken = int((~pixels_B3HW.isfinite().flatten(1).all(1)).sum())
    if broken:
        raise UserError(
            f"{label}: {broken} of {len(pixels_B3HW)} pictures of a batch are not finite numbers. If the system runs "
            "in half precision say method.dtype=float32"
        )


def is_done(folder: Path, batch: Sequence[Task]) -> bool:
    return all((folder / task.file).is_file() for task in batch)


def finish(folder: Path, tasks: Sequence[Task], seconds: float, device: str) -> bool:
    """Mark the run complete if all pictures of all processes are there."""
    if not is_done(folder, tasks):
        return False
    path = folder / "manifest.json"
    content = read_json(path)
    if content["status"] != COMPLETE:
        seconds += content.get("seconds", 0.0)
        write_json(path, {**content, "status": COMPLETE, "device": device, "seconds": round(seconds, 1)})
        for torn in folder.rglob(".*.tmp"):  # what a process that was killed had begun to write
            torn.unlink(missing_ok=True)
    return True


def skip(folder: Path, label: str, name: str, reason: str) -> bool:
    """Note why a system could not be run, so that the report's row says it; False where pictures are, which stay."""
    if (folder / "pictures").is_dir():
        return False
    told = {"label": label, "method": {"name": name}, "status": SKIPPED, "reason": reason}
    write_json(folder / "manifest.json", told)
    return True


def pictures_hash(folder: Path, tasks: Sequence[Task]) -> str:
    """Of all pictures, to tell whether scores belong to them."""
    whole = hashlib.sha256()
    for task in tasks:
        whole.update((folder / task.file).read_bytes())
    return whole.hexdigest()


def read_pictures(folder: Path, tasks: Sequence[Task], batch_size: int) -> Iterator[tuple[Sequence[Task], Tensor]]:
    """The written pictures, batch by batch: uint8 pictures_B3HW."""
    for batch in batches(tasks, batch_size):
        yield batch, torch.stack([read_png(folder / task.file) for task in batch])


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
