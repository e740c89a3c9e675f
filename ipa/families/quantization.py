"""Frozen weights in 8 or 4 bits: the libraries' own schemes, applied once, while a base is loaded.

    fp8    torchao, float8 (e4m3) with a scale for each row
    int8   torchao, 8-bit integers with a scale for each row
    nf4    bitsandbytes, 4-bit normal floats with a scale for each 64 weights (Dettmers et al. 2023, QLoRA); needs a GPU

Linear layers are quantized, convolutions and norms are not. A layer computes with its weights in the base's own dtype.
GGUF files are quantized already: `ipa.families.transformer_file`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ipa.errors import MissingWeights, UserError
from ipa.families.sources import is_single_file

SCHEMES = {"fp8": "torchao", "int8": "torchao", "nf4": "bitsandbytes"}  # and their packages
TORCHAO = {"fp8": "Float8WeightOnlyConfig", "int8": "Int8WeightOnlyConfig"}


def check_part(scheme: str | None, path: str, part: str, option: str = "base.quantization") -> None:
    """Raise UserError if ``option=scheme`` cannot load this part of a folder or hub id; reads its configuration."""
    if scheme is not None and scheme not in SCHEMES:
        raise UserError(f"{option}={scheme}: give {', '.join(SCHEMES)}, or null")
    saved = read_saved(path, part)
    stored = None if saved is None else name_scheme(saved)
    if stored not in (None, scheme):
        advice = f"give {option}={stored}" if stored in SCHEMES else "give a base that is not quantized"
        raise UserError(
            f"{option}={scheme or 'null'}: the {part} of base.path={path} is already quantized ({stored}): {advice}"
        )
    if scheme is not None:
        require_package(SCHEMES[scheme], f"{option}={scheme}")
    if scheme == "nf4" and not has_gpu():
        raise UserError(f"{option}=nf4: diffusers uses bitsandbytes only with a GPU; give fp8 or int8")


def require_package(name: str, option: str) -> None:
    if find_spec(name) is None:
        raise MissingWeights(f"{option} needs the package {name}: pip install {name}")


def name_scheme(saved: Mapping[str, Any]) -> str:
    """What a configuration's ``quantization_config`` is: one of SCHEMES, or the library's own words."""
    method = str(saved.get("quant_method"))
    if method == "bitsandbytes" and saved.get("load_in_4bit"):
        return str(saved.get("bnb_4bit_quant_type"))
    kind = json.dumps(saved.get("quant_type"))
    return next((scheme for scheme, name in TORCHAO.items() if method == "torchao" and name in kind), method)


def make_config(scheme: str, library: Any, dtype: torch.dtype, kept: Sequence[str] = ()) -> Any:
    """``library`` is diffusers or transformers; layers whose names contain one of ``kept`` stay as they are."""
    if scheme == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return library.BitsAndBytesConfig(**options, llm_int8_skip_modules=list(kept) or None)
    kind: Any = getattr(import_module("torchao.quantization"), TORCHAO[scheme])
    return library.TorchAoConfig(kind(), modules_to_not_convert=list(kept) or None)


def load_quantized(path: str, part: str, kind: Any, scheme: str, dtype: torch.dtype, kept: Sequence[str] = ()) -> Any:
    """A part of a folder or hub id, quantized unless it is already; ``kind`` is its class."""
    library = import_module(kind.__module__.partition(".")[0])
    config = None if read_saved(path, part) else make_config(scheme, library, dtype, kept)
    place = {"device_map": {"": own_device()}} if scheme == "nf4" else {}
    return kind.from_pretrained(path, subfolder=part, dtype=dtype, quantization_config=config, **place)


def has_gpu() -> bool:
    return torch.cuda.is_available()


def own_device() -> str:
    """The GPU of this process among those of its machine, where bitsandbytes quantizes."""
    local = next((os.environ[name] for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), "0")
    return f"cuda:{local}"


def read_saved(path: str, part: str) -> dict[str, Any] | None:
    """The ``quantization_config`` of a part of a pipeline, a folder or hub id; None without one, and for a file."""
    from transformers import PretrainedConfig

    if is_single_file(path):
        return None
    try:
        config, _ = PretrainedConfig.get_config_dict(path, subfolder=part)
    except OSError:  # what is missing is reported where it is loaded
        return None
    return config.get("quantization_config")
