"""The published IP-Adapter layout for UNets: `image_proj.<k>` and `ip_adapter.<n>.to_{k,v}_ip.weight`.

``<n>`` is the position in the UNet's list of attention processors, where self-attention takes the even numbers: the
i-th cross-attention layer, in the order down, up, mid, is number 2 i + 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

HEAD = "image_proj."
BRANCHES = "ip_adapter."
# the shape that says what the global head needs: rows are tokens × context width, columns the encoder's pooled width
GLOBAL_KEY = f"{HEAD}proj.weight"


def to_published(trainable: Mapping[str, Tensor], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """State of the trainable set (`image_proj.…`, `ip_adapter.branches.<i>.…`) → published names."""
    return {publish_name(name): tensor.to(dtype) for name, tensor in trainable.items()}


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names → state of the trainable set in fp32, whatever dtypes the file mixes."""
    return {unpublish_name(name): tensor.float() for name, tensor in tensors.items()}


def publish_name(name: str) -> str:
    found = re.fullmatch(r"ip_adapter\.branches\.(\d+)\.(.+)", name)
    return f"{BRANCHES}{2 * int(found[1]) + 1}.{found[2]}" if found else name


def unpublish_name(name: str) -> str:
    found = re.fullmatch(r"ip_adapter\.(\d+)\.(.+)", name)
    return f"{BRANCHES}branches.{(int(found[1]) - 1) // 2}.{found[2]}" if found else name


def check_readable_elsewhere(head: Any) -> None:
    """Raise ValueError for a shape that the readers of this layout would misread."""
    if head.num_tokens != 4:
        raise ValueError(
            f"tokens.num_tokens={head.num_tokens}: diffusers and ComfyUI assume 4 tokens for a global adapter, so this "
            "one cannot be exported in the published layout. Train with tokens.num_tokens=4, or sample with ipa."
        )


def check_fits(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    context_width: int,
    pooled_width: int,
    encoder: str,
    hidden: list[int],
) -> None:
    """Compare a published global adapter's shapes with a base and an encoder; one ValueError names all misfits."""
    if GLOBAL_KEY not in shapes:
        raise ValueError(f"{source} holds no {GLOBAL_KEY}: it is not a global IP-Adapter in the published layout.")
    rows, width = shapes[GLOBAL_KEY]
    problems = []
    if width != pooled_width:
        problems.append(
            f"it was trained on image embeddings of width {width}, the encoder {encoder} gives {pooled_width}"
        )
    if rows % context_width or shapes.get(f"{HEAD}norm.weight") != (context_width,):
        expected = shapes.get(f"{HEAD}norm.weight", (None,))[0]
        problems.append(f"its tokens have width {expected}, the base's cross-attention reads {context_width}")
    found = [shapes[name][0] for name in sorted_branches(shapes)]
    if found != hidden:
        order = " in another order" if sorted(found) == sorted(hidden) else ""
        widths = sorted(set(found)), sorted(set(hidden))
        problems.append(
            f"it has {len(found)} layers of widths {widths[0]}, the base {len(hidden)} of {widths[1]}{order}"
        )
    if problems:
        raise ValueError(
            f"{source} does not fit: " + "; ".join(problems) + ". Give the base and encoder that it was trained with "
            "(they are in its metadata), or another adapter."
        )


def token_count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """T of a global adapter's file."""
    return shapes[GLOBAL_KEY][0] // shapes[f"{HEAD}norm.weight"][0]


def sorted_branches(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    names = [name for name in shapes if name.startswith(BRANCHES) and name.endswith("to_k_ip.weight")]
    return sorted(names, key=lambda name: int(name.split(".")[1]))
