"""Reads what a base is before its weights: a diffusers folder, a hub id, or one file in the original layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors import safe_open

from ipa.errors import MissingWeights, UserError, brief
from ipa.files import is_hub_id

LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # stable_diffusion: diffusers' safety checker
WITHOUT_WEIGHTS = ("tokenizer", "scheduler")  # parts

Shapes = dict[str, tuple[int, ...]]


def is_single_file(path: str) -> bool:
    return path.endswith(".safetensors")


def read_index(path: str, key: str) -> dict[str, Any]:
    """A pipeline's index of parts (``model_index.json``); raises UserError for parts from other libraries."""
    check_pipeline_folder(path, key)
    index = read_config(DiffusionPipeline, path, key)
    check_libraries(index, path, key)
    return index


def check_libraries(index: dict[str, Any], path: str, key: str) -> None:
    """Refuse parts that are not from diffusers or transformers, since importing a module runs it; raises UserError."""
    for name, value in index.items():
        if isinstance(value, list) and value and value[0] not in LIBRARIES:
            raise UserError(
                f"{key}={path} says that its {name} comes from {value[0]}, which would run code that is neither "
                "diffusers' nor transformers'"
            )


def parts_in(index: dict[str, Any]) -> list[str]:
    return [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]


def check_files(path: str, parts: Iterable[str]) -> None:
    """Refuse a local folder that lacks files of a part; raises MissingWeights.

    In place of a missing tokenizer, transformers would make an empty one.
    """
    for name in parts if Path(path).is_dir() else ():
        endings = {file.suffix for file in Path(path, name).glob("*")}
        if not endings or not (name.startswith(WITHOUT_WEIGHTS) or endings & {".safetensors", ".bin"}):
            raise MissingWeights(f"base.path={path}: the files of its {name} are missing. Give a complete folder")


def read_config(part: Any, path: str, key: str, **location: str) -> dict[str, Any]:
    """A part's configuration as diffusers finds it; raises UserError naming ``key`` if it is not available."""
    try:
        return part.load_config(path, **location)
    except OSError as error:
        if Path(path).is_dir():
            raise MissingWeights(f"{key}={Path(path, *location.values())}: {brief(error)}") from error
        raise MissingWeights(
            f"{key}={path}: neither the hub nor its cache has this ({brief(error)}). Without the hub, give a folder."
        ) from error


def read_part(kind: Any, path: str, name: str, key: str = "base.path") -> dict[str, Any]:
    """The configuration of a pipeline's part ``name``, of diffusers' class ``kind``."""
    check_pipeline_folder(path, key)
    return read_config(kind, path, key, subfolder=name)


def make_without_weights(kind: Any, path: str, name: str, key: str = "base.path") -> Any:
    """The part on the meta device, without weights."""
    config = read_part(kind, path, name, key)
    with torch.device("meta"):
        return kind.from_config(config)


def read_cell_px(path: str) -> int:
    """Pixels per latent cell of a base's VAE."""
    return 2 ** (len(read_part(AutoencoderKL, path, "vae")["block_out_channels"]) - 1)


def read_header(path: str, key: str = "base.path") -> Shapes:
    """Names and shapes of a safetensors file; raises UserError."""
    if not Path(path).is_file():
        raise MissingWeights(f"{key}={path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors' own exception is none of Python's
        raise UserError(
            f"{key}={path} is not a safetensors file ({brief(error)}); it may have been cut short"
        ) from error


def check_pipeline_folder(path: str, key: str = "base.path") -> None:
    """Refuse a local path that is no pipeline folder; ``owner/name`` may be a hub id unless ``owner`` is a folder."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return
    if folder.is_file():
        raise UserError(
            f"{key}={path}: of single files only .safetensors are read, since others can run code when they are opened"
        )
    if folder.exists():
        raise MissingWeights(
            f"{key}={path} has no model_index.json: it is not a diffusers pipeline folder. "
            "Give the folder that `pipeline.save_pretrained` wrote."
        )
    if not is_hub_id(path):
        raise MissingWeights(
            f"{key}={path}: no such folder. Give a diffusers pipeline folder or a hub id owner/name, or for base.path "
            "a .safetensors file."
        )
