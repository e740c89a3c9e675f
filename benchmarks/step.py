"""Our training step against a reference step written from the public tutorial's description (reference.py).

    python benchmarks/step.py                                # what the machine can: on two CPU cores the demo world
    python benchmarks/step.py --size sd15 --image-px 256 --batch 2 --rounds 5        # full size with random weights
    python benchmarks/step.py --compile                      # on a GPU: SD 1.5 and SDXL at several batch sizes as well
    python benchmarks/step.py --each                         # what each way to be faster gives by itself

The ways take turns in one process, on the same random batch; of the reference there are two, in fp32 and under bf16
autocast, and the faster one counts. FLOPs are counted by torch, once, without computing anything. Nothing else should
run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import models
import torch
from measuring import Spread, save, table, take_turns, times_faster
from reference import ReferenceStep

from ipa.model import IPAdapterModel
from ipa.training.average import WeightAverage
from ipa.training.flops import count_flops
from ipa.training.memory import make_batch
from ipa.types import Batch

REFERENCES = {"reference, fp32": None, "reference, bf16 autocast": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """How our step works. ``half``: frozen weights in bf16, once, and bf16 autocast; ``half_encoders``: VAE and image
    encoder in bf16, and the rest as it is.
    """

    cached: bool = False
    half: bool = False
    autocast: bool = False  # which comes with ``half`` anyway
    half_encoders: bool = False
    channels_last: bool = True
    compiled: bool = False
    fused: bool = True
    checkpointing: bool = False
    quantization: str | None = None  # of the denoiser, and of T5; only for estimates


# what the recipes say: the demo world is small, where bf16 costs more than it gives
SETTINGS = {"demo": Setting(), "sd15": Setting(half=True), "sdxl": Setting(half=True)}
PLAIN = Setting(channels_last=False, fused=False)
EACH = {
    "encoders' work from a cache": {"cached": True},
    "frozen weights in bf16, once": {"half": True},
    "VAE and image encoder alone in bf16": {"half_encoders": True},
    "convolutions channels-last": {"channels_last": True},
    "transformer blocks compiled": {"compiled": True},
    "AdamW in one kernel": {"fused": True},
    "gradient checkpointing (for memory)": {"checkpointing": True},
}


class OurStep:
    """What a step of `train.py` computes: errors, gradients, optimizer, and the average that the demo recipe keeps."""

    def __init__(self, model: IPAdapterModel, setting: Setting, average: bool) -> None:
        """``model`` as ``prepare`` leaves it."""
        self.model, self.setting = model, setting
        if setting.checkpointing:
            model.checkpoint_gradients()
        if setting.compiled:
            model.compile_blocks()
        model.adapter.install()
        weights = list(model.trainable.parameters())
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=1e-2, fused=setting.fused)
        self.average = WeightAverage(model.trainable, 0.98) if average else None

    def __call__(self, batch: Batch) -> None:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.setting.half or self.setting.autocast):
            loss = self.model.errors(batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()


def prepare(model: IPAdapterModel, setting: Setting) -> IPAdapterModel:
    """Type and layout of the frozen parts, which are changed in place."""
    frozen = {True: (model.family, model.encoder), False: ()}[setting.half]
    encoders = (model.family.vae, model.encoder) if setting.half_encoders else ()
    for part in (*frozen, *encoders):
        part.to(torch.bfloat16)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    for part in (model.family.denoiser, model.family.vae):
        part.to(memory_format=layout)
    return model


def make(size: str, device: torch.device) -> IPAdapterModel:
    torch.manual_seed(0)
    with device:
        return models.MAKERS[size]().to(device)


def own(model: IPAdapterModel) -> IPAdapterModel:
    """A model with frozen parts of its own, whose layout and type can be changed."""
    model.adapter.remove()
    return copy.deepcopy(model)


def compare(size: str, batch: int, image_px: int, rounds: int, device: torch.device, compiles: bool) -> dict[str, Any]:
    """Both references, ours online and cached: seconds of every round, and the ratios to the faster reference."""
    model = make(size, device)
    online = make_batch(model, batch, image_px, cached=False)
    cached = make_batch(model, batch, image_px, cached=True)
    flops = {"online": count(model, online), "cached": count(model, cached)}
    setting = SETTINGS[size]
    average = size == "demo"
    step = OurStep(prepare(own(model), setting), setting, average)
    ours: dict[str, Callable[[], object]] = {"online": partial(step, online), "cached": partial(step, cached)}
    if not setting.half:
        halved = replace(setting, half_encoders=True)
        ours["online, encoders in bf16"] = partial(OurStep(prepare(own(model), halved), halved, average), online)
    if compiles:
        changed = replace(setting, compiled=True)
        compiled = OurStep(prepare(own(model), changed), changed, average)
        ours |= {"online, compiled": partial(compiled, online), "cached, compiled": partial(compiled, cached)}
    reference = ReferenceStep(model)  # takes the model, so it comes last
    ways = {name: partial(reference, online, autocast) for name, autocast in REFERENCES.items()} | ours
    seconds = take_turns(ways, rounds)
    return {
        "size": size,
        "batch": batch,
        "image_px": image_px,
        "setting": asdict(setting),
        "tflop_per_sample": {name: number / batch / 1e12 for name, number in flops.items()},
        "seconds": seconds,
    }


def count(model: IPAdapterModel, batch: Batch) -> int:
    """FLOPs that a step on this batch needs."""
    model.adapter.install()
    flops = count_flops(model, batch)
    model.adapter.remove()
    assert flops is not None  # which it is of weights that are shared out
    return flops


def each(size: str, batch: int, image_px: int, rounds: int, device: torch.device) -> dict[str, Spread]:
    """Way to be faster → how many times as fast a plain step of ours gets with it alone."""
    found = {}
    model = make(size, device)
    for name, change in EACH.items():
        settings = {"plain": PLAIN, "changed": replace(PLAIN, **change)}  # type: ignore[arg-type]
        ways = {}
        for which, setting in settings.items():
            step = OurStep(prepare(own(model), setting), setting, average=size == "demo")
            ways[which] = partial(step, make_batch(model, batch, image_px, setting.cached))
        found[name] = times_faster(take_turns(ways, rounds, warm_up=3), "changed", than="plain")
        del ways, step
        gc.collect()
        print(f"{name}: {found[name].median:.2f} ×")
    return found


def in_markdown(found: Mapping[str, Any]) -> str:
    parts = [describe(result) for result in found["results"]]
    if found["each"]:
        rows = [
            [name, f"{s['median']:.2f} ×", f"{s['lowest']:.2f} – {s['highest']:.2f}"]
            for name, s in found["each"]["ratios"].items()
        ]
        about = found["each"]
        title = f"### Each alone, {about['size']}, batch {about['batch']}, {about['image_px']} px"
        parts.append(f"{title}\n\n" + table(["against a plain step of ours in fp32", "", "lowest – highest"], rows))
    return "\n\n".join(parts)


def describe(result: Mapping[str, Any]) -> str:
    seconds, batch = result["seconds"], result["batch"]
    title = f"### {result['size']}, batch {batch}, {result['image_px']} px\n\n"
    if seconds is None:
        return f"{title}Out of memory."
    best = faster_reference(seconds)
    rows = []
    for name in seconds:
        ratio = times_faster(seconds, name, than=best)
        rate = batch / Spread.of(seconds[name]).median
        rows.append([name, f"{rate:,.2f}", f"{ratio.median:.2f}", f"{ratio.lowest:.2f} – {ratio.highest:.2f}"])
    tflop = result["tflop_per_sample"]
    allowed = tflop["online"] / tflop["cached"]
    reached = times_faster(seconds, "cached", than=best).median / allowed
    return (
        title
        + table(["step", "samples/s", f"× {best}", "lowest – highest"], rows)
        + f"\n\nCounted: {tflop['online']:.5g} TFLOP a sample online, {tflop['cached']:.5g} cached, {allowed:.2f} × "
        f"less; the cached step is {100 * reached:.0f} % of that faster."
    )


def faster_reference(seconds: Mapping[str, list[float]]) -> str:
    return min(REFERENCES, key=lambda name: Spread.of(seconds[name]).median)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=tuple(models.MAKERS), help="default: demo, and on a GPU all")
    parser.add_argument("--batch", nargs="+", type=int, help="default: 32 in the demo world, else 2, on a GPU several")
    parser.add_argument("--image-px", type=int, help="default: what the base was made for")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--each", action="store_true", help="also measure each way to be faster alone, at the first size"
    )
    parser.add_argument("--compile", action="store_true", help="also our step with the transformer blocks compiled")
    parser.add_argument("--name", default="step", help="of the files that are written")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    found: dict[str, Any] = {"results": [], "each": {}}
    sizes = options.size or (list(models.MAKERS) if device.type == "cuda" else ["demo"])
    for size in sizes:
        image_px = options.image_px or models.IMAGE_PX[size]
        for batch in options.batch or batches(size, device):
            try:
                result = compare(size, batch, image_px, options.rounds, device, options.compile)
            except torch.OutOfMemoryError:
                result = {"size": size, "batch": batch, "image_px": image_px, "seconds": None}
            found["results"].append(result)
            print(describe(result))
            gc.collect()
            torch.cuda.empty_cache()
    if options.each:
        size = sizes[0]
        batch, image_px = (options.batch or batches(size, device))[0], options.image_px or models.IMAGE_PX[size]
        ratios = each(size, batch, image_px, options.rounds, device)
        found["each"] = {
            "size": size,
            "batch": batch,
            "image_px": image_px,
            "ratios": {name: asdict(spread) for name, spread in ratios.items()},
        }
    save(options.name, found, in_markdown(found))


def batches(size: str, device: torch.device) -> list[int]:
    on_gpu = {"sd15": [8, 16, 32, 64, 128], "sdxl": [2, 4, 8]}
    if size == "demo":
        return [32]
    return on_gpu[size] if device.type == "cuda" else [2]


if __name__ == "__main__":
    main()
