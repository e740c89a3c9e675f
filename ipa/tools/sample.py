"""Make pictures with a trained adapter.

    python -m ipa.tools.sample adapter=runs/…/adapter.safetensors image=photo.png text="red heart" scale=0.5 out=new.png

Base and encoder come from the adapter's metadata unless given; misfits are found before any weight is read. Several
image prompts at once are image=[a.png,b.png].
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ipa.cli import quiet_libraries
from ipa.errors import UserError
from ipa.tools.options import run_tool

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass
class Options:
    """What `python -m ipa.tools.sample` takes, with the defaults."""

    adapter: str = MISSING  # an adapter file, .safetensors or .bin
    image: list[str] = MISSING  # the image prompt, or several
    text: str = ""  # the text prompt
    scale: float = 1.0  # λ, the weight of the image prompt: 0 ignores it
    out: str = "picture.png"  # written here; several pictures become a row
    num_images: int = 1
    seed: int = 0
    steps: int = 25
    guidance: float = 2.0  # 1 means none
    guidance_rescale: float = 0.0  # φ, takes back contrast that guidance adds; 0.7 for bases with zero terminal SNR
    base: str | None = None  # diffusers folder, hub id or .safetensors file instead of the metadata's
    base_config: str | None = None  # layout of a base that is one file
    encoder: str | None = None  # open_clip name, local-dir:FOLDER or transformers folder instead of the metadata's
    encoder_weights: str | None = None  # open_clip's tag, or a file
    device: str = "cpu"
    dtype: str = "float32"  # of the frozen weights


def check_options(options: Any) -> None:
    """Refuse at once what would fail only after the picture was made; raises UserError."""
    for name in ("num_images", "steps"):
        if options[name] < 1:
            raise UserError(f"{name}={options[name]}: at least 1")
    if Path(options.out).suffix.lower() not in FORMATS:
        raise UserError(f"out={options.out}: a picture's name ends with one of {', '.join(FORMATS)}")
    if not options.image:
        raise UserError("image=[]: at least one image prompt")
    if not 0 <= options.guidance_rescale <= 1:
        raise UserError(f"guidance_rescale={options.guidance_rescale}: from 0 (none) to 1; 0.7 is usual")


def sample(options: Any) -> Path:
    """Generate and write the picture; returns its path. Raises UserError with a message for the user."""
    check_options(options)
    quiet_libraries()
    from ipa.data.images.transforms import read_picture
    from ipa.export.loading import load_model

    pictures = [read_picture(Path(path)) for path in options.image]
    model = load_model(
        Path(options.adapter),
        base=options.base,
        encoder=options.encoder,
        encoder_weights=options.encoder_weights,
        base_config=options.base_config,
        dtype=options.dtype,
    )
    return generate_row(move(model, options.device), pictures, options)


def move(model: Any, device: str) -> Any:
    """The model on ``device``; raises UserError in the words of torch, which has several exceptions for this."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device}: {str(error).splitlines()[0]}") from error


def generate_row(model: Any, pictures: list[Any], options: Any) -> Path:
    import torch
    from PIL import Image

    from ipa.data.images.transforms import fit_reference
    from ipa.files import write_atomically
    from ipa.sampling import SamplingOptions, generate
    from ipa.types import to_uint8

    edge_px = model.encoder.image_size_px
    references = [fit_reference(picture, edge_px, model.reference_fit).to(model.device) for picture in pictures]
    features = [model.encode_reference(each.expand(options.num_images, -1, -1, -1)) for each in references]
    how = SamplingOptions(
        num_steps=options.steps,
        guidance=options.guidance,
        scale=options.scale,
        guidance_rescale=options.guidance_rescale,
    )
    seeds = range(options.seed, options.seed + options.num_images)
    pixels = generate(model, features, [options.text] * options.num_images, seeds, how)
    row = torch.cat(list(to_uint8(pixels)), dim=-1).permute(1, 2, 0).numpy()
    out = Path(options.out)
    write_atomically(out, lambda beside: Image.fromarray(row).save(beside, format=FORMATS[out.suffix.lower()]))
    return out


def main() -> None:
    run_tool(sys.argv[1:], Options, sample, __doc__)


if __name__ == "__main__":
    main()
