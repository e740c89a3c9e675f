"""Loads a transformer from its own file, GGUF or safetensors, after checking its names against the configuration.

The file has the names of the original code or of diffusers; the other parts come from the pipeline's folder or hub id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import GGUFQuantizationConfig
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from ipa.errors import MissingWeights, UserError, brief
from ipa.families.quantization import make_config, require_package
from ipa.families.sources import Shapes, is_single_file, read_header

OPTION = "base.transformer_file"
PREFIX = "model.diffusion_model."  # of the transformer in a file that has other parts, too


def is_gguf(file: str) -> bool:
    return file.endswith(".gguf")


def check_exists(file: str) -> None:
    if not Path(file).is_file():
        raise MissingWeights(f"{OPTION}={file}: no such file")


def check_file(file: str, transformer: Any, path: str, scheme: str | None) -> None:
    """Raise UserError for a file that does not fit ``transformer``, which has no weights; reads only the header."""
    check_format(file, scheme)
    shapes = read_gguf_header(file) if is_gguf(file) else read_header(file, OPTION)
    expected = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    found = in_names_of_diffusers(shapes, transformer, file)
    if wrong := sorted({name for name, _ in expected.items() ^ found.items()}):
        raise UserError(
            f"{OPTION}={file} does not fit base.path={path}: {len(wrong)} weights are missing, unknown or of another "
            f"size, such as {wrong[0]}. Give the folder or hub id of the base that the file was made from"
        )


def check_format(file: str, scheme: str | None) -> None:
    if is_gguf(file):
        require_package("gguf", f"{OPTION}={file}")
        if scheme is not None:
            raise UserError(f"base.quantization={scheme}: {OPTION}={file} is quantized already; give null")
    elif not is_single_file(file):
        raise UserError(f"{OPTION}={file}: give a .gguf or a .safetensors file")


def in_names_of_diffusers(shapes: Shapes, transformer: Any, file: str) -> Shapes:
    """The shapes under diffusers' names; raises UserError for tensors that its conversion does not read."""
    if shapes.keys() == transformer.state_dict().keys():
        return shapes
    loadable: Any = SINGLE_FILE_LOADABLE_CLASSES
    convert = loadable[type(transformer).__name__]["checkpoint_mapping_fn"]
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    own = {name.removeprefix(PREFIX) for name in shapes if name.startswith(PREFIX)} or shapes.keys()
    try:
        converted = convert(checkpoint=weights, config=dict(transformer.config))
    except (LookupError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{OPTION}={file} has no {type(transformer).__name__}, or not under known names ({brief(error)})"
        ) from error
    if unread := sorted(own & weights.keys()):  # diffusers would leave them out without a word
        raise UserError(
            f"{OPTION}={file} has {len(unread)} tensors that {type(transformer).__name__} does not know, such as "
            f"{unread[0]}: scales of weights in fp8, for example. Give a file in bf16 or fp16, or a .gguf"
        )
    return {name: tuple(value.shape) for name, value in converted.items()}


def read_gguf_header(file: str) -> Shapes:
    """Names and shapes; raises UserError for types that diffusers does not compute with."""
    import gguf
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, UNQUANTIZED_TYPES

    check_exists(file)
    try:
        tensors = gguf.GGUFReader(file).tensors
    except (ValueError, LookupError, OSError) as error:
        raise UserError(f"{OPTION}={file} is not a GGUF file ({brief(error)}); it may have been cut short") from error
    known = {*SUPPORTED_GGUF_QUANT_TYPES, *UNQUANTIZED_TYPES}
    if others := sorted({each.tensor_type.name for each in tensors if each.tensor_type not in known}):
        usual = ", ".join(sorted(kind.name for kind in known))
        raise UserError(f"{OPTION}={file} has weights of the type {', '.join(others)}; diffusers knows {usual}")
    return {each.name: tuple(int(size) for size in reversed(each.shape)) for each in tensors}


def load_file(kind: Any, file: str, path: str, scheme: str | None, dtype: torch.dtype) -> Any:
    """The transformer of class ``kind`` from a checked file, with the configuration of ``path``."""
    import diffusers

    if is_gguf(file):
        config: Any = GGUFQuantizationConfig(compute_dtype=dtype)
    else:
        config = make_config(scheme, diffusers, dtype) if scheme else None
    try:
        return kind.from_single_file(
            file, config=path, subfolder="transformer", quantization_config=config, dtype=dtype
        )
    except OSError as error:
        raise MissingWeights(f"{OPTION}={file} cannot be loaded: {brief(error)}") from error
