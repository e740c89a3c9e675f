"""Sampling with our adapter in the public pipeline, against diffusers' own `load_ip_adapter` of the same file.

    python benchmarks/sample.py                              # the demo world, some minutes on two CPU cores
    python benchmarks/sample.py --size sd15 --batch 1 --image-px 256 --steps 2       # full size, random weights
    python benchmarks/sample.py --size sd15 sdxl --half --batch 1 8                  # on a GPU

Both have the same frozen weights, texts, features of one image prompt, noise, steps and guidance, and work from there
to pixels; they take turns in one process, and it is checked that they make the same pictures. Nothing else should run
on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import models
import torch
from measuring import save, table, take_turns, times_faster
from torch import Tensor

from ipa.export.loading import load_model
from ipa.export.published import to_published, write_adapter
from ipa.model import IPAdapterModel
from ipa.sampling import draw_noise, prompt_arguments
from ipa.types import Features, ImageCondition

HEADS = ("global", "fine_grained")
OURS, THEIRS = "ours", "diffusers"
GUIDANCE = 3.0
FILE = "adapter.safetensors"
# of pixels in [0, 1]: the two write the same sums in other orders, and every step goes on from the last one's rounding
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1}


def make(size: str, head: str, device: torch.device, half: bool) -> IPAdapterModel:
    """The demo world's trained adapter, or random weights at full size; not installed."""
    torch.manual_seed(0)
    if size == "demo":
        model = load_model(Path(f"demo/adapters/decoupled_{head}.safetensors"))
        model.adapter.remove()
    else:
        with device:
            model = models.MAKERS[size](head)
    if half:
        model.family.to(torch.bfloat16)
    return model.to(device)


def draw_features(model: IPAdapterModel) -> Features:
    """One random picture as the encoder sees it; the encoder's work is not measured."""
    size_px = model.encoder.image_size_px
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (1, 3, size_px, size_px), generator=draw, dtype=torch.uint8)
    return model.encode_reference(pictures.to(model.device))


def stock_pipeline(model: IPAdapterModel) -> Any:
    """diffusers' pipeline on a copy of the base, with the adapter as diffusers reads it from its exported file."""
    pipeline = copy.deepcopy(model.family).pipeline()
    with tempfile.TemporaryDirectory() as folder:
        tensors = to_published(model.trainable.state_dict(), torch.float32)
        write_adapter(Path(folder) / FILE, tensors, model.describe())
        pipeline.load_ip_adapter(folder, subfolder="", weight_name=FILE, image_encoder_folder=None)
    return pipeline


def ours(model: IPAdapterModel, features: Features, texts: list[str], options: Mapping[str, Any]) -> Tensor:
    with prompt_arguments(
        [(model, [ImageCondition([features])])], texts, (options["width"], options["height"])
    ) as arguments:
        return model.family.pipeline()(**arguments, **options).images


def theirs(pipeline: Any, embeds: Tensor, texts: list[str], options: Mapping[str, Any]) -> Tensor:
    """``embeds``: of no image, then of the image; diffusers takes one for all pictures of a call."""
    empty = [""] * len(texts)
    return pipeline(texts, negative_prompt=empty, ip_adapter_image_embeds=[embeds], **options).images


def two_ways(model: IPAdapterModel, batch: int, image_px: int, steps: int) -> dict[str, Callable[[], Tensor]]:
    """Each call makes ``batch`` pictures, pixels in [0, 1]; ``model`` has its adapter installed afterwards."""
    image, texts = draw_features(model), ["a picture of a thing"] * batch
    features = image.map(lambda x: x.expand(batch, *x.shape[1:]))
    halves = [read(model, model.no_image(1)), read(model, image)]
    stock = stock_pipeline(model)
    options = {
        "latents": draw_noise(model.family.latent_shape(image_px), range(batch)).to(model.device, stock.unet.dtype),
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE,
        "height": image_px,
        "width": image_px,
        "output_type": "pt",
    }
    embeds = torch.cat(halves).unsqueeze(1).to(stock.unet.dtype)
    model.adapter.install()
    return {
        OURS: partial(ours, model, features, texts, options),
        THEIRS: partial(theirs, stock, embeds, texts, options),
    }


def read(model: IPAdapterModel, features: Features) -> Tensor:
    """What the head reads of them."""
    found = features.pooled_BE if model.head.uses == "pooled" else features.patches_BPF
    assert found is not None, f"the head reads {model.head.uses} features"
    return found


@torch.no_grad()
def compare(model: IPAdapterModel, batch: int, image_px: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of every call of both; raises AssertionError where their pictures are not the same."""
    ways = two_ways(model, batch, image_px, steps)
    apart = float((ways[OURS]().float() - ways[THEIRS]().float()).abs().max())
    allowed = TOLERANCE[model.family.unet.dtype]
    assert apart <= allowed, f"the pictures differ by {apart:.2g}, more than {allowed}: they are not made alike"
    seconds = take_turns(ways, rounds, warm_up=1)
    model.adapter.remove()
    return {"batch": batch, "image_px": image_px, "steps": steps, "apart": apart, "seconds": seconds}


def in_markdown(found: Mapping[str, Any]) -> str:
    columns = ["", "batch", "px", "steps", "ours, s", "diffusers, s", "ours / diffusers", "lowest – highest", "apart"]
    heading = (
        f"With guidance, from texts and image features to pixels; medians of {found['rounds']} pairs. `apart` is the "
        "largest difference between their pictures, of pixels in [0, 1]."
    )
    return f"{heading}\n\n{table(columns, [row_of(result) for result in found['results']])}"


def row_of(result: Mapping[str, Any]) -> Sequence[object]:
    seconds = result["seconds"]
    ratio = times_faster(seconds, THEIRS, than=OURS)  # how many times as long ours takes
    medians = [f"{statistics.median(seconds[name]):.3f}" for name in (OURS, THEIRS)]
    spread = f"{ratio.lowest:.2f} – {ratio.highest:.2f}"
    sizes = [f"{result['size']}, {result['head']}", result["batch"], result["image_px"], result["steps"]]
    return [*sizes, *medians, f"{ratio.median:.3f}", spread, f"{result['apart']:.1g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=tuple(models.MAKERS), default=["demo"])
    parser.add_argument("--head", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--image-px", type=int, help="default: what the base was made for")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15, help="pairs")
    parser.add_argument("--half", action="store_true", help="the base in bf16")
    parser.add_argument("--name", default="sample", help="of the files that are written here")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for size, head in ((size, head) for size in options.size for head in options.head):
        model = make(size, head, device, options.half)
        image_px = options.image_px or models.IMAGE_PX[size]
        for batch in options.batch:
            result = compare(model, batch, image_px, options.steps, options.rounds)
            results.append({"size": size, "head": head, **result})
    found = {"half": options.half, "rounds": options.rounds, "results": results}
    save(options.name, found, in_markdown(found))


if __name__ == "__main__":
    main()
