"""Base models without weights: their modules as configuration describes them, on torch's default device.

    with torch.device("meta"):
        family = make_hollow(StableDiffusion, "demo/base")

The size of a base and the memory of a step are estimated from this before anything is downloaded. The public bases that
the recipes name are described in `ipa.families.published`, so they need no hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from ipa.errors import MissingWeights
from ipa.families.published import PUBLISHED, Parts
from ipa.families.sources import is_single_file, parts_in, read_config, read_index
from ipa.families.stored import BITS, store
from ipa.families.transformer_file import check_exists, is_gguf
from ipa.weights import read_dtype


def make_hollow(
    family: Any,
    path: str,
    config: str | None = None,
    dtype: str = "float32",
    vae_dtype: str | None = None,
    channels_last: bool = False,
    quantization: str | None = None,
    text_quantization: str | None = None,
    transformer_file: str | None = None,
    **options: Any,
) -> Any:
    """A base of this class with random or no weights, as ``from_pretrained`` with these arguments would load it.

    It is not quantized: see ``quantize_hollow``. Raises MissingWeights for a base that is not published and has no
    configuration in a folder, on the hub or in its cache.
    """
    layout = (config or path) if is_single_file(path) else path
    made = family(**{**make_parts(family, layout), **family.left_out(**options)}, source=path, **options)
    made.to(read_dtype(dtype, "base.dtype"))
    if vae_dtype:
        nn.Module.to(made.vae, read_dtype(vae_dtype, "base.vae_dtype"))
    if channels_last:
        for part in (made.denoiser, made.vae):
            part.to(memory_format=torch.channels_last)
    return made


def make_parts(family: Any, layout: str) -> Parts:
    if layout in PUBLISHED and not Path(layout).exists():
        return PUBLISHED[layout]()
    index = read_index(layout, "base.path")
    return {name: make_part(layout, name, *index[name]) for name in parts_in(index) if name not in family.absent}


def quantize_hollow(
    family: Any,
    quantization: str | None = None,
    text_quantization: str | None = None,
    transformer_file: str | None = None,
) -> None:
    """Give layers their quantized sizes; raises MissingWeights for a file that does not exist."""
    for name, scheme in family.quantized_parts(quantization, text_quantization).items():
        if scheme and (part := getattr(family, name)) is not None:
            store(part, BITS[scheme], remade=scheme == "nf4", kept=family.kept)
    if transformer_file and is_gguf(transformer_file):
        check_exists(transformer_file)
        weights = sum(parameter.numel() for parameter in family.denoiser.parameters())
        store(family.denoiser, 8 * Path(transformer_file).stat().st_size / weights)


def make_part(layout: str, name: str, library: str, kind: str) -> Any:
    """A part of a pipeline from its configuration; tokenizers and schedulers whole."""
    if "tokenizer" in name:
        with torch.device("cpu"):
            return read_transformers(getattr(transformers, kind), layout, name)
    if library == "transformers":
        model = getattr(transformers, kind)
        return model(read_transformers(model.config_class, layout, name)).eval()
    part = getattr(diffusers, kind)
    return part.from_config(read_config(part, layout, "base.path", subfolder=name))


def read_transformers(kind: Any, layout: str, name: str) -> Any:
    try:
        return kind.from_pretrained(layout, subfolder=name)
    except OSError as error:
        raise MissingWeights(f"base.path={layout} has no readable {name}") from error
