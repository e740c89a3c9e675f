"""What a base is, told before any weight is read: a diffusers folder, a hub id, or one file in the original layout.

read_kind("demo/base")                  # "stable_diffusion"
read_host_widths("model.safetensors")   # from the header alone
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open

from ipa.errors import MissingWeights, UserError, brief
from ipa.families.cross_attention import find_hosts
from ipa.types import BaseWidths

TITLES = {"stable_diffusion": "Stable Diffusion 1.x or 2.x", "sdxl": "Stable Diffusion XL"}
ADVICE = {"stable_diffusion": "base=sd15 or base=sd21 (recipe=sd15)", "sdxl": "base=sdxl (recipe=sdxl)"}
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # stable_diffusion: diffusers' safety checker
UNET = "model.diffusion_model."
# the published order, which is also that of find_hosts
SECTIONS = {"input_blocks": 0, "output_blocks": 1, "middle_block": 2}
HOST_KEY = re.compile(rf"{re.escape(UNET)}(\w+)\.(.+)\.attn2\.to_k\.weight")

Shapes = dict[str, tuple[int, ...]]


def is_single_file(path: str) -> bool:
    return path.endswith(".safetensors")


def read_kind(path: str, key: str = "base.path") -> str:
    """The name of the family that reads this base: a key of ``TITLES``.

    Raises UserError for a base of another kind, OSError when there is nothing to read.
    """
    kind = kind_of_header(read_header(path, key)) if is_single_file(path) else kind_of_pipeline(path, key)
    if kind is None:
        raise UserError(
            f"{key}={path} is none of the bases that ipa knows: "
            f"{' and '.join(f'{title} ({ADVICE[name]})' for name, title in TITLES.items())}, made for text to image"
        )
    return kind


def check_kind(path: str, config: str | None, name: str) -> None:
    """Refuse a base, or a layout for its file, that belongs to another family than ``name``; raises UserError."""
    kind = read_kind(path)
    if kind != name:
        raise UserError(f"base.path={path} is a {TITLES[kind]} pipeline: use {ADVICE[kind]}")
    if config is None or not is_single_file(path):
        return
    if is_single_file(config):
        raise UserError(f"base.config={config} is a file: give the diffusers folder or hub id whose layout it has")
    layout = read_kind(config, "base.config")
    contexts = read_unet_config(config, "base.config")["cross_attention_dim"], read_host_widths(path).context
    if contexts[0] != contexts[1]:
        raise UserError(
            f"base.config={config} is the layout of {TITLES[layout]} with context width {contexts[0]}, but "
            f"base.path={path} holds {TITLES[kind]} with {contexts[1]}: give the layout of the base it was made from"
        )


def read_host_widths(path: str) -> BaseWidths:
    """Context width, and the inner width of every host in order; no weight is read."""
    if is_single_file(path):
        return host_widths_of_header(read_header(path))
    config = read_unet_config(path)
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    return BaseWidths(unet.config.cross_attention_dim, [host.attention.to_k.out_features for host in find_hosts(unet)])


def read_image_size(path: str) -> int:
    """Edge in pixels of the pictures that a pipeline's UNet was made for."""
    unet = read_unet_config(path)
    vae = read_config(AutoencoderKL, path, "base.path", subfolder="vae")
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def host_widths_of_header(shapes: Shapes) -> BaseWidths:
    """The same from the names and shapes of a file in the original (ldm) layout, where names are all there is."""
    found = []
    for name, shape in shapes.items():
        match = HOST_KEY.fullmatch(name)
        if match:
            place = [int(number) for number in re.findall(r"\d+", match[2])]
            found.append((SECTIONS[match[1]], place, shape))
    found.sort()
    return BaseWidths(found[0][2][1], [shape[0] for _, _, shape in found])


def kind_of_header(shapes: Shapes) -> str | None:
    """The kind of a file in the original layout; None for what no family here reads."""
    conv_in, conv_out = shapes.get(f"{UNET}input_blocks.0.0.weight"), shapes.get(f"{UNET}out.2.weight")
    if conv_in is None or conv_out is None or not any(HOST_KEY.fullmatch(name) for name in shapes):
        return None
    if conv_in[1] != conv_out[0]:  # inpainting and the like read more than latents
        return None
    if any(name.startswith("conditioner.embedders.1.") for name in shapes):
        return "sdxl"
    # SDXL's refiner and unCLIP have an added embedding too, but other conditions in it
    return None if f"{UNET}label_emb.0.0.weight" in shapes else "stable_diffusion"


def kind_of_pipeline(path: str, key: str) -> str | None:
    """The kind of a diffusers folder or hub id; None for what no family here reads."""
    check_pipeline_folder(path, key)
    index = read_config(DiffusionPipeline, path, key)
    check_libraries(index, path, key)
    if "unet" not in index or index.get("text_encoder", [None])[0] is None:  # the refiner has its second one only
        return None
    config = read_unet_config(path, key)
    if config.get("in_channels", 4) != config.get("out_channels", 4) or config.get("class_embed_type"):
        return None
    return {None: "stable_diffusion", "text_time": "sdxl"}.get(config.get("addition_embed_type"))


def check_libraries(index: dict[str, Any], path: str, key: str) -> None:
    """Refuse parts from elsewhere than the two libraries, since importing a module runs it; raises UserError."""
    for name, value in index.items():
        if isinstance(value, list) and value and value[0] not in LIBRARIES:
            raise UserError(
                f"{key}={path} says that its {name} comes from {value[0]}, which would run code that is neither "
                "diffusers' nor transformers'"
            )


def read_unet_config(path: str, key: str = "base.path") -> dict[str, Any]:
    check_pipeline_folder(path, key)
    return read_config(UNet2DConditionModel, path, key, subfolder="unet")


def read_config(part: Any, path: str, key: str, **place: str) -> dict[str, Any]:
    """A part's configuration as diffusers finds it; raises UserError naming ``key`` when it is not to be had."""
    try:
        return part.load_config(path, **place)
    except OSError as error:
        if Path(path).is_dir():
            raise MissingWeights(f"{key}={path}: {brief(error)}") from error
        raise MissingWeights(
            f"{key}={path}: neither the hub nor its cache gave this ({brief(error)}). Without the hub, give a folder."
        ) from error


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
    """Refuse what is clearly a local path but no pipeline folder; all of the form ``owner/name`` may be a hub id."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return
    if folder.is_file():
        raise UserError(
            f"{key}={path}: of single files only .safetensors are read, since others can run code when they are opened"
        )
    if folder.exists():
        raise MissingWeights(
            f"{key}={path} is there but holds no model_index.json: it is not a diffusers pipeline folder. "
            "Give the folder that `pipeline.save_pretrained` wrote."
        )
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise MissingWeights(
            f"{key}={path}: no such folder. Give a diffusers pipeline folder or a hub id owner/name, or for base.path "
            "a .safetensors file."
        )
