"""How much memory a training step takes, and which settings fit which card.

    python benchmarks/memory.py                   # SD 1.5 at 512 px and SDXL at 1024 px, minutes on one CPU core
    python benchmarks/memory.py --size sd15 --image-px 768
    python benchmarks/memory.py --size flux chroma sd3_medium sd35_medium sd35_large --name memory_transformers

On a GPU the peak is measured, except of quantized bases. Elsewhere it is estimated (`ipa.training.memory` says how);
the VAE is in bf16 like the rest, in which the recipe of SDXL differs. A card counts with ``RESERVE_GIB`` and
``FRAGMENTED`` less.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from typing import Any

import models
import torch
from measuring import save, table
from step import OurStep, Setting, prepare
from tqdm import tqdm

from ipa.families.hollow import quantize_hollow
from ipa.training.memory import FRAGMENTED, GIB, RESERVE_GIB, estimate_peak, make_batch

STEPS = 2  # that are measured; the second has the optimizer's state from the start
CARDS_GIB = (8, 12, 16, 24, 48, 80)
# whose peaks are found, and between and beyond which they grow with the batch: what is largest may change, as the VAE's
# activations take over from the denoiser's
BATCHES = (1, 4, 16)
HALF = Setting(half=True)
SETTINGS = {
    "online": HALF,
    "online, checkpointing": replace(HALF, checkpointing=True),
    "cached": replace(HALF, cached=True),
    "cached, checkpointing": replace(HALF, cached=True, checkpointing=True),
    "online, frozen weights in fp32": replace(HALF, half=False, autocast=True),
    "cached, checkpointing, frozen weights in fp32": replace(
        HALF, half=False, autocast=True, cached=True, checkpointing=True
    ),
}
LIGHT = replace(HALF, checkpointing=True)
TRANSFORMER_SETTINGS = {
    "checkpointing": LIGHT,
    "checkpointing, fp8": replace(LIGHT, quantization="fp8"),
    "checkpointing, nf4": replace(LIGHT, quantization="nf4"),
}


def settings_of(size: str) -> dict[str, Setting]:
    return SETTINGS if size in models.IMAGE_PX else TRANSFORMER_SETTINGS


def estimate(size: str, setting: Setting, batch: int, image_px: int, head: str = "global") -> int:
    """Peak bytes of a step, from fake tensors."""
    with torch.device("meta"):
        model = models.MAKERS[size](head)
    make_step = partial(OurStep, setting=setting, average=False)
    prepare(model, setting)
    if setting.quantization:
        quantize_hollow(model.family, setting.quantization, setting.quantization)
    return estimate_peak(model, make_step, batch, image_px, setting.cached)


def measure(size: str, setting: Setting, batch: int, image_px: int, head: str = "global") -> int:
    """Peak bytes of a step on this machine's GPU; raises torch.OutOfMemoryError."""
    with torch.device("cuda"):
        model = prepare(models.MAKERS[size](head).to("cuda"), setting)
    step = OurStep(model, setting, average=False)
    samples = make_batch(model, batch, image_px, setting.cached)
    for _ in range(STEPS):
        torch.cuda.reset_peak_memory_stats()
        step(samples)
    return torch.cuda.max_memory_allocated()


def peaks(size: str, setting: Setting, image_px: int, head: str) -> dict[int, int]:
    """Batch size → peak bytes."""
    way = measure if torch.cuda.is_available() and not setting.quantization else estimate
    found = {}
    for batch in BATCHES if size in models.IMAGE_PX else BATCHES[:2]:
        found[batch] = way(size, setting, batch, image_px, head)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def line(found: Mapping[int, int], batch: int) -> tuple[float, float]:
    """Bytes of a step without samples, and of each sample, through the nearest known batch sizes below and above."""
    sizes = sorted(found)
    above = next((i for i, size in enumerate(sizes) if i and size >= batch), len(sizes) - 1)
    one, other = sizes[above - 1], sizes[above]
    each = (found[other] - found[one]) / (other - one)
    return found[one] - one * each, each


def peak_at(found: Mapping[int, int], batch: int) -> float:
    fixed, each = line(found, batch)
    return fixed + batch * each


def usable(card_gib: float) -> float:
    return (card_gib - RESERVE_GIB) * (1 - FRAGMENTED) * GIB


def largest_batch(found: Mapping[int, int], card_gib: float) -> int:
    """Samples that fit a card; 0 where not even one does."""
    return next(batch for batch in count(0) if peak_at(found, batch + 1) > usable(card_gib))


def in_words(batch: int, size: str, known: int) -> str:
    """Of transformers, no batch is told beyond the known ones, where the VAE's activations may be largest."""
    return f"{known}+" if batch >= known and size not in models.IMAGE_PX else str(batch or "–")


def in_markdown(found: Mapping[str, Any]) -> str:
    parts = []
    for result in found["results"]:
        rows = []
        for name, by_batch in result["peaks"].items():
            known = {int(batch): number for batch, number in by_batch.items()}
            _, each = line(known, max(known))
            fits = [in_words(largest_batch(known, card), result["size"], max(known)) for card in CARDS_GIB]
            rows.append([name, f"{known[min(known)] / GIB:.2f}", f"{each / GIB:.2f}", *fits])
        columns = ["setting", "GiB, one sample", "each more", *(f"{card} GB" for card in CARDS_GIB)]
        title = f"### {result['size']}, {result['image_px']} px, {result['head']} tokens, {found['how']}"
        parts.append(f"{title}\n\n{table(columns, rows)}")
    note = (
        f"Under a card's size: the largest batch of one process that fits, with {RESERVE_GIB:g} GiB left for CUDA's "
        f"context and {FRAGMENTED:.0%} for what the allocator cannot use."
    )
    return "\n\n".join([*parts, note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=tuple(models.MAKERS), default=["sd15", "sdxl"])
    parser.add_argument("--image-px", type=int, help="default: what the base was made for")
    parser.add_argument("--head", choices=tuple(models.HEADS), default="global")
    parser.add_argument("--name", default="memory", help="of the files with the result")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "how": "measured" if torch.cuda.is_available() else "estimated",
        "settings": {name: asdict(setting) for size in options.size for name, setting in settings_of(size).items()},
        "results": [],
    }
    for size in options.size:
        image_px = options.image_px or models.IMAGE_PX.get(size, models.TRANSFORMERS_PX)
        each = {
            name: peaks(size, setting, image_px, options.head)
            for name, setting in tqdm(settings_of(size).items(), desc=f"settings of {size}")
        }
        found["results"].append({"size": size, "image_px": image_px, "head": options.head, "peaks": each})
    save(options.name, found, in_markdown(found))


if __name__ == "__main__":
    main()
