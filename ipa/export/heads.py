"""The heads that adapter files can hold, one row each: how to recognise a head, read its sizes, and who else reads it.

To make the files of a new head readable, add a row to ``HEADS`` under the name that its ``describe()`` gives as "head".

Sources: diffusers' ``_convert_ip_adapter_image_proj_to_diffusers``; ComfyUI_IPAdapter_plus' ``IPAdapter`` class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ipa.adapter.heads import FullHead, GlobalHead, MLPHead, ResamplerHead
from ipa.adapter.time_resampler import TimeResamplerHead
from ipa.contracts import TokenHead
from ipa.errors import UserError

HEAD = "image_proj."

Shapes = Mapping[str, tuple[int, ...]]
Metadata = Mapping[str, str]


@dataclass(frozen=True)
class HeadRow:
    """``read`` returns the feature width and the constructor's keyword arguments; KeyError means a missing tensor.

    ``key`` is a tensor that tells this head apart in a file without metadata; heads without one are recognised by the
    metadata alone. ``recorded`` are the sizes that no shape shows. A training can start from a file that has the same
    ``shared`` sizes. ``assumed`` returns the sizes, by their attributes, that other
    programs do not read from the file; None for a head that they do not know.
    """

    cls: type[TokenHead]
    title: str
    read: Callable[[Shapes, Metadata], tuple[int, dict[str, int]]]
    key: str = ""
    no_image: Literal["zeros", "blank"] = "zeros"
    recorded: tuple[str, ...] = ()
    shared: tuple[str, ...] = ("num_tokens",)
    assumed: Callable[[Any, str], dict[str, int]] | None = None


def read_global(shapes: Shapes, metadata: Metadata) -> tuple[int, dict[str, int]]:
    rows, features = shapes[f"{HEAD}proj.weight"]
    context = shapes[f"{HEAD}norm.weight"][0]
    return features, {"num_tokens": rows // context, "context_width": context}


def read_mlp(shapes: Shapes, metadata: Metadata) -> tuple[int, dict[str, int]]:
    context = shapes[f"{HEAD}norm.weight"][0]
    sizes = {"num_tokens": shapes[f"{HEAD}proj.2.weight"][0] // context, "context_width": context}
    return shapes[f"{HEAD}proj.0.weight"][1], sizes


def read_full(shapes: Shapes, metadata: Metadata) -> tuple[int, dict[str, int]]:
    sizes = {"num_tokens": read_number(metadata, "num_tokens", 257), "context_width": shapes[f"{HEAD}proj.3.weight"][0]}
    return shapes[f"{HEAD}proj.0.weight"][1], sizes


def read_resampler(shapes: Shapes, metadata: Metadata) -> tuple[int, dict[str, int]]:
    _, num_tokens, width = shapes[f"{HEAD}latents"]
    head_width = read_number(metadata, "head_width", 64)
    inner = shapes[f"{HEAD}layers.0.0.to_q.weight"][0]
    if inner % head_width:
        raise UserError(f"its resampler's attention is {inner} wide, not a multiple of head_width={head_width}")
    sizes = {
        "num_tokens": num_tokens,
        "context_width": shapes[f"{HEAD}proj_out.weight"][0],
        "width": width,
        "heads": inner // head_width,
        "depth": sum(name.startswith(f"{HEAD}layers.") and name.endswith(".0.to_q.weight") for name in shapes),
        "head_width": head_width,
        "expansion": shapes[f"{HEAD}layers.0.1.1.weight"][0] // width,
    }
    return shapes[f"{HEAD}proj_in.weight"][1], sizes


def read_time_resampler(shapes: Shapes, metadata: Metadata) -> tuple[int, dict[str, int]]:
    features, sizes = read_resampler(shapes, metadata)
    return features, sizes | {"time_channels": shapes[f"{HEAD}time_embedding.linear_1.weight"][1]}


def read_number(metadata: Metadata, name: str, published: int) -> int:
    """A size from the metadata, ``published`` if it does not say. Raises UserError."""
    text = metadata.get(name) or str(published)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"its metadata says {name}={text}, which is not a size")
    return int(text)


def assumed_of_resampler(head: ResamplerHead, layout: str) -> dict[str, int]:
    sizes = {"depth": 4, "head_width": 64, "expansion": 4}
    if layout == "diffusers":
        return sizes
    sdxl = head.context_width == 2048
    return sizes | {"num_tokens": 16, "heads": 20 if sdxl else 12, "width": 1280 if sdxl else head.context_width}


HEADS: dict[str, HeadRow] = {
    "global": HeadRow(GlobalHead, "global", read_global, "proj.weight", assumed=lambda head, layout: {"num_tokens": 4}),
    "full": HeadRow(
        FullHead, "full", read_full, "proj.3.weight", "blank", ("num_tokens",), assumed=lambda head, layout: {}
    ),
    "mlp": HeadRow(MLPHead, "global (MLP)", read_mlp, "proj.2.weight"),
    "time_resampler": HeadRow(
        TimeResamplerHead,
        "time-aware fine-grained",
        read_time_resampler,
        "time_embedding.linear_1.weight",
        recorded=("head_width",),
        shared=("num_tokens", "width", "heads", "depth", "head_width", "expansion", "time_channels"),
    ),
    "fine_grained": HeadRow(
        ResamplerHead,
        "fine-grained",
        read_resampler,
        "latents",
        "blank",
        ("head_width",),
        ("num_tokens", "width", "heads", "depth", "head_width", "expansion"),
        assumed_of_resampler,
    ),
}


def recognise(shapes: Shapes, metadata: Metadata) -> str:
    """The head's name: the metadata's if it is known here, else by the tensor that diffusers goes by too."""
    if metadata.get("head") in HEADS:
        return metadata["head"]
    keys = {f"{HEAD}{row.key}": name for name, row in HEADS.items() if row.key}
    for key, name in keys.items():
        if key in shapes:
            return name
    found = ", ".join(sorted(shapes)[:3]) or "nothing"
    raise UserError(f"it has none of {', '.join(keys)}, but {found} …")


def name_of(head: TokenHead) -> str:
    """The name of a head's row; the class name of one that has none."""
    return next((name for name, row in HEADS.items() if type(head) is row.cls), type(head).__name__)


def title_of(name: str) -> str:
    return HEADS[name].title if name in HEADS else name
