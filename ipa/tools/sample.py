"""Generate images with a trained adapter.

    python -m ipa.tools.sample adapter=runs/…/adapter.safetensors image=photo.png text="red heart" scale=0.5 out=new.png

Base, encoder, steps and guidance are those of the adapter's training, from its metadata or its run folder, unless they
are given. If base and encoder do not fit the adapter, this fails before any weights are read. Several image prompts:
'image=[a.png,b.png]'.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ipa.cli import quiet_libraries
from ipa.errors import UserError
from ipa.tools.options import option, run_tool

OPTIONS = ("num_steps", "guidance", "scale", "guidance_rescale", "image_size_px")  # of `ipa.sampling`
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass
class Options:
    adapter: str = option(MISSING, "adapter file, checkpoint, or run folder (its last checkpoint)")
    image: list[str] = option(MISSING, "image prompt, or several")
    text: str = option("", "text prompt")
    scale: float = option(1.0, "λ, the weight of the image prompt; 0 ignores it")
    out: str = option("picture.png", f"output file, one of {', '.join(FORMATS)}; several images form a row")
    num_images: int = option(1, "number of images, each with its own seed", at_least=1)
    seed: int = option(0, "seed of the first image")
    num_steps: int | None = option(None, "denoising steps; null: as the training's previews, or else 25", at_least=1)
    guidance: float | None = option(
        None, "classifier-free guidance scale, 1: none; null: as the training's previews, or else usual for the base"
    )
    guidance_rescale: float | None = option(
        None, "φ, reduces the contrast that guidance adds; 0.7 for bases with zero terminal SNR", at_least=0, at_most=1
    )
    image_size_px: int | None = option(None, "width and height of an image; null: the base's native size", at_least=8)
    base: str | None = option(None, "base model in place of the metadata's: diffusers folder, hub id or .safetensors")
    base_config: str | None = option(None, "for a base in one file: diffusers folder or hub id with its layout")
    encoder: str | None = option(
        None, "image encoder in place of the metadata's: open_clip name, local-dir:FOLDER or transformers folder"
    )
    encoder_weights: str | None = option(None, "open_clip's tag of pretrained weights, or a file")
    device: str | None = option(None, "torch device; null: a GPU if there is one, or else the CPU")
    dtype: str = option("float32", "data type of the frozen weights", one_of=("float32", "float16", "bfloat16"))


def sample(options: Any) -> Path:
    """Generate the images and write them; returns the file. Raises UserError for options that cannot be used."""
    out = Path(options.out)
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"out={out}: the name of an image ends with one of {', '.join(FORMATS)}")
    if not options.image:
        raise UserError("image=[]: give at least one image prompt")
    quiet_libraries()
    from ipa.data.images.transforms import read_picture
    from ipa.export.loading import load_model
    from ipa.export.reading import read_adapter
    from ipa.sampling import SamplingOptions, recorded_options

    images = [read_picture(Path(path)) for path in options.image]
    model = load_model(
        Path(options.adapter),
        base=options.base,
        encoder=options.encoder,
        encoder_weights=options.encoder_weights,
        base_config=options.base_config,
        dtype=options.dtype,
    )
    chosen = {"guidance": model.family.guidance} | recorded_options(read_adapter(Path(options.adapter)).metadata)
    chosen |= {name: options[name] for name in OPTIONS if options[name] is not None}
    model.family.check_size(chosen.get("image_size_px") or model.family.image_size_px)
    write_row(generate_images(move(model, options.device), images, options, SamplingOptions(**chosen)), out)
    return out


def move(model: Any, device: str | None) -> Any:
    """The model on ``device``; raises UserError with torch's message, for which torch has several exceptions."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device}: {str(error).splitlines()[0]}") from error


def generate_images(model: Any, images: list[Any], options: Any, sampling: Any) -> Any:
    """pixels_B3HW in [-1, 1], one image per seed."""
    from ipa.data.images.transforms import fit_reference
    from ipa.sampling import generate

    size_px = model.encoder.image_size_px
    references = [fit_reference(image, size_px, model.reference_fit).to(model.device) for image in images]
    features = [model.encode_reference(each.expand(options.num_images, -1, -1, -1)) for each in references]
    seeds = range(options.seed, options.seed + options.num_images)
    return generate(model, features, [options.text] * options.num_images, seeds, sampling)


def write_row(pixels_B3HW: Any, out: Path) -> None:
    import torch
    from PIL import Image

    from ipa.files import write_atomically
    from ipa.types import first_not_finite, to_uint8

    if first_not_finite({"": pixels_B3HW}):
        raise UserError("the images are not finite: if dtype= is float16, give dtype=float32 or bfloat16")
    row = torch.cat(list(to_uint8(pixels_B3HW)), dim=-1).permute(1, 2, 0).numpy()
    write_atomically(out, lambda path: Image.fromarray(row).save(path, format=FORMATS[out.suffix.lower()]))


def main() -> None:
    run_tool(sys.argv[1:], Options, sample, __doc__)


if __name__ == "__main__":
    main()
