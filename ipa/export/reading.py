"""One reader for every file with an IP-Adapter: exported files, checkpoints, and files of other programs.

    adapter = read_adapter(Path("checkpoint-50000/pytorch_model.bin"))
    print(adapter.file.describe(), adapter.remarks)

Prefixes of a name, such as ``module`` of DDP and DeepSpeed or Lightning's ``state_dict``, are ignored. The names are
those of published files, of the public training script (``image_proj_model``, ``adapter_modules``), and of diffusers'
attention processors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipa.errors import UserError
from ipa.export.adapter_file import AdapterFile, identify
from ipa.export.branches import branches_in, written_name
from ipa.export.published import publish_name
from ipa.export.storage import is_published, load_adapter
from ipa.types import first_not_finite
from ipa.weights import dtype_name

WEIGHTS = {"average": "state_dict.average.", "raw": "state_dict.trainable."}
METADATA = "adapter_metadata."  # of our own checkpoints
HEAD = re.compile(r"(?:.*\.)?(?:image_proj|image_proj_model|ip_adapter_proj_model)\.(.+)")
BRANCH = re.compile(r"(?:.*\.)?(?:ip_adapter|adapter_modules)\.(\d+\..+)")
PROCESSOR = re.compile(r"(?:.*\.)?((?:down_blocks|up_blocks|mid_block)\..+)\.processor\.(to_[kv]_ip)(?:\.0)?\.weight")
XLABS = re.compile(r"(?:.*\.)?double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.(weight|bias)")
# diffusers' names for the layers of the time-aware resampler → the published ones
RESAMPLER = {
    "ln0": "0.norm1",
    "ln1": "0.norm2",
    "attn.to_q": "0.to_q",
    "attn.to_kv": "0.to_kv",
    "attn.to_out.0": "0.to_out",
    "adaln_norm": "1.0",
    "ff.net.0.proj": "1.1",
    "ff.net.2": "1.3",
    "adaln_proj": "2.1",
}
RESAMPLER_LAYER = re.compile(rf"layers\.(\d+)\.({'|'.join(map(re.escape, RESAMPLER))})\.(weight|bias)")
SECTIONS = ("down_blocks", "up_blocks", "mid_block")  # the published order
WRAPPERS = re.compile(r"^((module|state_dict|model|_orig_mod)\.)+")  # only for words
# what a folder can hold, besides the checkpoints of a run
FOLDER_FILES = ("adapter.safetensors", "model.safetensors", "pytorch_model.bin", "mp_rank_00_model_states.pt")


@dataclass(frozen=True)
class Adapter:
    """Valid tensors by published names, in the file's dtypes; ``remarks`` report other names and what was ignored.

    ``is_published`` says whether the file itself, not only what is written of it, is one that other programs read.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    file: AdapterFile
    remarks: tuple[str, ...] = ()
    is_published: bool = False


def read_adapter(path: Path, weights: str | None = None) -> Adapter:
    """The adapter in a file, or in a folder: a run's newest whole checkpoint, else its adapter file.

    ``weights`` chooses ``average`` or ``raw`` of a checkpoint, by default the average if there is one. Raises UserError
    for what is not an adapter that ipa reads, with what it is, and for tensors that are not finite floating-point
    numbers.
    """
    found = find_file(path)
    entries, metadata = load_adapter(found)
    if is_own := any(name.startswith(METADATA) for name in entries):
        metadata = {name.removeprefix(METADATA): str(entries[name]) for name in entries if name.startswith(METADATA)}
        entries = chosen_weights(entries, weights, found, branches_in({}, metadata))
    elif weights is not None:
        raise UserError(f"weights={weights}: {found} holds one set of weights; only a checkpoint has two")
    names = published_names(name for name, value in entries.items() if isinstance(value, Tensor))
    tensors = renamed(entries, names, str(found))
    check_sound(tensors, str(found))
    everything = tensors or {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    file = identify({name: tuple(tensor.shape) for name, tensor in everything.items()}, metadata, str(found))
    others = [
        name for name, published in names.items() if name not in (published, written_name(published, file.branches))
    ]
    said = () if is_own else tuple(remarks(entries, names, others))
    return Adapter(tensors, metadata, file, said, not (is_own or others) and is_published(found))


def find_file(path: Path) -> Path:
    """The file to read for a folder; ``path`` itself if it is a file, or a folder without one."""
    for checkpoint in sorted((path / "checkpoints").glob("step_*.ckpt"), reverse=True):
        try:
            load_adapter(checkpoint)
            return checkpoint
        except UserError:
            continue  # cut short when the run was killed
    return next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)


def chosen_weights(entries: Mapping[str, Any], weights: str | None, path: Path, branches: str) -> dict[str, Any]:
    """One set of weights of our own checkpoint, by published names."""
    averaged = any(name.startswith(WEIGHTS["average"]) for name in entries)
    if weights == "average" and not averaged:
        raise UserError(f"weights=average: the training of {path} kept no average; omit it")
    prefix = WEIGHTS[weights or ("average" if averaged else "raw")]
    return {
        publish_name(name.removeprefix(prefix), branches): value
        for name, value in entries.items()
        if name.startswith(prefix) and name != f"{prefix}count"  # of averaged steps
    }


def published_names(names: Iterable[str]) -> dict[str, str]:
    """Name in the file → published name, for all tensors of an adapter.

    Layers named by their position in the UNet are numbered in the order of ``unet.attn_processors``.
    """
    matches = {name: (HEAD.fullmatch(name), BRANCH.fullmatch(name), PROCESSOR.fullmatch(name)) for name in names}
    layers = sorted({at[1] for _, _, at in matches.values() if at}, key=place_in_unet)
    numbers = {layer: 2 * index + 1 for index, layer in enumerate(layers)}
    found = {}
    for name, (head, branch, at) in matches.items():
        if branch:
            found[name] = f"ip_adapter.{branch[1]}"
        elif at:
            found[name] = f"ip_adapter.{numbers[at[1]]}.{at[2]}.weight"
        elif xlabs := XLABS.fullmatch(name):
            found[name] = f"ip_adapter.{xlabs[1]}.to_{xlabs[2]}_ip.{xlabs[3]}"
        elif head:
            layer = RESAMPLER_LAYER.fullmatch(head[1])
            found[name] = f"image_proj.{f'layers.{layer[1]}.{RESAMPLER[layer[2]]}.{layer[3]}' if layer else head[1]}"
    return found


def place_in_unet(layer: str) -> tuple[int, list[int]]:
    return SECTIONS.index(layer.partition(".")[0]), [int(number) for number in re.findall(r"\d+", layer)]


def renamed(entries: Mapping[str, Tensor], names: Mapping[str, str], source: str) -> dict[str, Tensor]:
    """Tensors by their published names; raises UserError if two that differ have the same one."""
    tensors: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for name, published in names.items():
        tensor = entries[name].detach()
        if published in tensors and not same(tensors[published], tensor):
            raise UserError(
                f"{source} holds two adapters: {first[published]} and {name} have different values. Save one of them "
                "into a file of its own"
            )
        tensors.setdefault(published, tensor)
        first.setdefault(published, name)
    return tensors


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())


def check_sound(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError, which names the tensor, unless all are dense and finite."""
    for name, tensor in tensors.items():
        if fault := fault_of(tensor):
            raise UserError(f"{source}: {name} {fault}. Save the adapter's weights as dense float16 or float32 tensors")


def fault_of(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return "has no values (device meta)"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"is sparse or nested ({tensor.layout})"
    if tensor.is_quantized or not tensor.is_floating_point():
        return f"holds {dtype_name(tensor.dtype)}, not floating-point numbers"
    return "holds numbers that are not finite" if first_not_finite({"": tensor.float()}) else None


def remarks(entries: Iterable[str], names: Mapping[str, str], others: Sequence[str]) -> Iterator[str]:
    """Notes on how another program's file was read; names are counted by their first part."""
    if others:
        yield f"read under other names: {counted(others)}"
    if left_out := [name for name in entries if name not in names]:
        yield f"left out: {counted(left_out)}"


def counted(names: Iterable[str]) -> str:
    counts = Counter(WRAPPERS.sub("", name).partition(".")[0] for name in names)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())
