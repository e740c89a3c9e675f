"""Make pictures with a trained adapter.

    python -m ipa.tools.sample adapter=runs/…/adapter.safetensors image=photo.png text="red heart" scale=0.5 out=new.png

Base and encoder come from the adapter's metadata unless given; misfits are found before any weight is read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ValidationError

from ipa.cli import quiet_libraries

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass
class Options:
    """What `python -m ipa.tools.sample` takes, with the defaults."""

    adapter: str = MISSING  # an adapter file in the published layout
    image: str = MISSING  # the image prompt
    text: str = ""  # the text prompt
    scale: float = 1.0  # λ, the weight of the image prompt: 0 ignores it
    out: str = "picture.png"  # written here; several pictures become a row
    num_images: int = 1
    seed: int = 0
    steps: int = 25
    guidance: float = 2.0  # 1 means none
    base: str | None = None  # diffusers folder or hub id instead of the metadata's
    encoder: str | None = None  # open_clip name or local-dir:FOLDER instead of the metadata's
    device: str = "cpu"


def read_options(arguments: list[str]) -> Any:
    """``key=value`` words → options; raises ValueError that names what is misspelt, wrong or missing."""
    import difflib

    names = [field.name for field in fields(Options)]
    options = OmegaConf.structured(Options)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in names:
            near = difflib.get_close_matches(name, names, 1)
            question = f" Did you mean {near[0]}=…?" if near else ""
            raise ValueError(
                f"{argument!r} is not one of the options {', '.join(f'{name}=' for name in names)}.{question}"
            )
        try:
            options[name] = value
        except ValidationError as error:
            raise ValueError(f"{argument}: {str(error).splitlines()[0]}") from error
    missing = [name for name in ("adapter", "image") if OmegaConf.is_missing(options, name)]
    if missing:
        raise ValueError(f"please give {' and '.join(f'{name}=FILE' for name in missing)}")
    check_options(options)
    return options


def check_options(options: Any) -> None:
    """Refuse at once what would fail only after the picture was made; raises ValueError."""
    for name in ("num_images", "steps"):
        if options[name] < 1:
            raise ValueError(f"{name}={options[name]}: at least 1")
    if Path(options.out).suffix.lower() not in FORMATS:
        raise ValueError(f"out={options.out}: a picture's name ends with one of {', '.join(FORMATS)}")


def sample(options: Any) -> Path:
    """Generate and write the picture; returns its path. Raises ValueError or OSError with a message for the user."""
    from ipa.checkpoint import read_metadata

    adapter = Path(options.adapter)
    metadata = read_metadata(adapter)
    sources = {name: options[name] or metadata.get(name, "") for name in ("base", "encoder")}
    for name, source in sources.items():
        if not source:
            raise ValueError(f"{adapter} does not say which {name} it was trained with: give {name}=…")
    picture = read_picture(Path(options.image))
    model = load_model(adapter, sources["base"], sources["encoder"], metadata)
    return generate_row(move(model, options.device), picture, options)


def move(model: Any, device: str) -> Any:
    """The model on ``device``; raises ValueError in the words of torch, which has several exceptions for this."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device}: {str(error).splitlines()[0]}") from error


def read_picture(path: Path) -> Any:
    """An upright RGB picture, transparency on white; raises FileNotFoundError or ValueError naming the file."""
    from ipa.data.rejects import Rejected
    from ipa.data.transforms import open_picture

    if not path.is_file():
        raise FileNotFoundError(f"image={path}: no such file")
    try:
        return open_picture(path.read_bytes(), background="white", max_pixels=100_000_000)
    except Rejected as error:
        raise ValueError(f"image={path} cannot be read as a picture: {error}") from error


def load_model(adapter: Path, base: str, encoder: str, metadata: dict[str, str]) -> Any:
    """A model with the adapter's weights, installed; shapes are compared before any weight is read."""
    from ipa.adapter.heads import GlobalHead
    from ipa.adapter.kinds import DecoupledAdapter
    from ipa.checkpoint import load_adapter, read_shapes
    from ipa.encoders.open_clip import OpenClipEncoder, read_pooled_width
    from ipa.export.published import check_fits, from_published, token_count
    from ipa.families.stable_diffusion import StableDiffusion, read_widths
    from ipa.model import IPAdapterModel

    shapes = read_shapes(adapter)
    context_width, hidden = read_widths(base)
    check_fits(
        shapes,
        source=str(adapter),
        context_width=context_width,
        pooled_width=read_pooled_width(encoder),
        encoder=encoder,
        hidden=hidden,
    )
    family = StableDiffusion.from_pretrained(base)
    vision = OpenClipEncoder.from_pretrained(encoder, metadata.get("encoder_weights") or None)
    head = GlobalHead(vision.pooled_width, family.context_width, token_count(shapes))
    model = IPAdapterModel(family, vision, head, DecoupledAdapter(family.hosts()))
    tensors, _ = load_adapter(adapter)
    try:
        model.trainable.load_state_dict(from_published(tensors))
    except RuntimeError as error:  # names or shapes that the first look could not see
        raise ValueError(f"{adapter} does not fit {base}: {' '.join(str(error).split())}") from error
    model.adapter.install()
    return model


def generate_row(model: Any, picture: Any, options: Any) -> Path:
    import torch
    from PIL import Image

    from ipa.checkpoint import write_atomically
    from ipa.data.transforms import square, to_tensor
    from ipa.sampling import SamplingOptions, generate
    from ipa.types import to_uint8

    reference = to_tensor(square(picture, model.encoder.image_size_px))
    features = model.encode_reference(reference.expand(options.num_images, -1, -1, -1).to(model.device))
    how = SamplingOptions(num_steps=options.steps, guidance=options.guidance, scale=options.scale)
    seeds = range(options.seed, options.seed + options.num_images)
    pixels = generate(model, features, [options.text] * options.num_images, seeds, how)
    row = torch.cat(list(to_uint8(pixels)), dim=-1).permute(1, 2, 0).numpy()
    out = Path(options.out)
    write_atomically(out, lambda beside: Image.fromarray(row).save(beside, format=FORMATS[out.suffix.lower()]))
    return out


def main() -> None:
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        for field in fields(Options):
            print(f"    {field.name}={'FILE (needed)' if field.default is MISSING else field.default}")
        return
    try:
        options = read_options(sys.argv[1:])
        quiet_libraries()
        out = sample(options)
    except (ValueError, OSError) as error:
        sys.exit(f"sample: {error}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
