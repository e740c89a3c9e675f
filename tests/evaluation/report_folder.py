"""Folders as an evaluation leaves them: real small images, made-up scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

METHOD = {"name": "IP-Adapter", "source": "mine/adapter.safetensors", "trained": 22_319_616, "uses_text": True}
SAMPLING = {"num_steps": 50, "guidance": 7.5, "scale": 1.0, "image_size_px": None}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_picture(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), (colour % 256, 60, 90)).save(path)


def write_items(folder: Path, ids: Sequence[str], num_seeds: int = 1, name: str = "demo") -> None:
    items = [{"id": each, "captions": [f"<{each}> & more"], "reference": f"references/{each}.png"} for each in ids]
    benchmark = {"name": name, "settings": {"kind": "shards", "fingerprint": "abc123"}}
    write_json(folder / "items.json", {"benchmark": benchmark, "num_seeds": num_seeds, "items": items})


def write_run(
    folder: Path, label: str, scores: dict[str, Any] | None = None, pictures: Sequence[str] = (), **manifest: Any
) -> None:
    """A run with the images ITEM_NUMBER, listed but not written; ``method`` and ``sampling`` update the defaults."""
    content = {"label": label, "status": "complete", "prompt": "empty", "seed": 0, "versions": {"torch": "2.15.0"}}
    content["method"] = {**METHOD, **manifest.pop("method", {})}
    content["sampling"] = {**SAMPLING, **manifest.pop("sampling", {})}
    content["pictures"] = [
        {"item": each[:-2], "number": int(each[-1]), "file": f"pictures/{each}.png"} for each in pictures
    ]
    write_json(folder / label / "manifest.json", {**content, **manifest})
    if scores is not None:
        write_json(folder / label / "scores.json", scores)


def write_skipped(folder: Path, name: str, reason: str) -> None:
    content = {"label": name, "method": {"name": name}, "status": "skipped", "reason": reason}
    write_json(folder / name / "manifest.json", content)


def scored(clip_i: float, items: dict[str, float] | None = None, **missing: str) -> dict[str, Any]:
    metrics = {
        "clip_i": {"value": clip_i, "low": clip_i - 0.01, "high": clip_i + 0.01, "higher_is_better": True},
        "clip_t": {"value": 0.2, "low": 0.19, "high": 0.21, "higher_is_better": True},
        "clip_score": {"value": 0.5, "low": 0.49, "high": 0.51, "higher_is_better": True},
        "kid": {"value": 0.02, "higher_is_better": False},
        "kid_std": {"value": 0.001, "higher_is_better": None},
    }
    settings = {"clip": {"prefix": "A photo depicts "}}
    per_item = {"clip_i": items or {}}
    return {"pictures": "f00d", "settings": settings, "metrics": metrics, "per_item": per_item, "missing": missing}


def write_demo(folder: Path) -> Path:
    """Six items with two images each; λ = 0, 0.5 and 1, an unfinished system and a skipped one."""
    ids = [f"item{number}" for number in range(6)]
    write_items(folder, ids, num_seeds=2)
    pictures = [f"{each}_{number}" for each in ids for number in range(2)]
    for number, each in enumerate(ids):
        write_picture(folder / "references" / f"{each}.png", 40 * number)
    for scale in (0, 0.5, 1.0):
        items = {each: 0.1 * number * scale for number, each in enumerate(ids)}
        write_run(folder, f"mine-{scale}", scored(0.25 * scale, items), pictures, sampling={"scale": scale})
        for number, each in enumerate(pictures):
            write_picture(folder / f"mine-{scale}" / "pictures" / f"{each}.png", 20 * number)
    style = {"name": "t2i_style", "source": "style", "trained": None}
    write_run(folder, "style", None, pictures, method=style, status="unfinished")
    write_picture(folder / "style" / "pictures" / "item0_0.png", 200)
    write_skipped(folder, "sd_unclip", "download it | from <there> and give path=FOLDER")
    return folder
