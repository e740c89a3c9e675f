"""The published IP-Adapter layout for UNets: `image_proj.<k>` and `ip_adapter.<n>.to_{k,v}_ip.weight`.

``<n>`` is the position in the UNet's list of attention processors, where self-attention takes the even numbers: the
i-th cross-attention layer, in the order down, up, mid, is number 2 i + 1. A simple adapter has the first part only.
Files of other families, which only ipa reads, number their branches alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ipa.encoders import public_name
from ipa.errors import UserError
from ipa.export.adapter_file import BRANCHES, FEATURES, AdapterFile, base_name, identify
from ipa.types import BaseWidths, EncoderWidths


def to_published(trainable: Mapping[str, Tensor], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """State of the trainable set (`image_proj.…`, `ip_adapter.branches.<i>.…`) → published names."""
    return {publish_name(name): tensor.to(dtype) for name, tensor in trainable.items()}


def from_published(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Published names → state of the trainable set in one ``dtype``, whatever the file mixes."""
    return {unpublish_name(name): tensor.to(dtype) for name, tensor in tensors.items()}


def publish_name(name: str) -> str:
    found = re.fullmatch(r"ip_adapter\.branches\.(\d+)\.(.+)", name)
    return f"{BRANCHES}{2 * int(found[1]) + 1}.{found[2]}" if found else name


def unpublish_name(name: str) -> str:
    found = re.fullmatch(r"ip_adapter\.(\d+)\.(.+)", name)
    return f"{BRANCHES}branches.{(int(found[1]) - 1) // 2}.{found[2]}" if found else name


def with_metadata(published: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` with what the tensors show of head, kind and sizes: what a file of them should record."""
    shapes = {name: tuple(tensor.shape) for name, tensor in published.items()}
    return {**metadata, **identify(shapes, metadata, "the adapter").metadata()}


def check_fits(
    file: AdapterFile,
    base_widths: BaseWidths,
    encoder_widths: EncoderWidths,
    *,
    source: str,
    base: str,
    encoder: str,
) -> None:
    """Compare a file with a base and an encoder before any weight is read; one UserError lists all misfits.

    ``source``, ``base`` and ``encoder`` are the names that the user gave.
    """
    problems = base_misfits(file, base_widths, base) + encoder_misfits(file, encoder_widths, encoder)
    if problems:
        raise UserError(
            f"{source} is {file.describe()}. It does not fit: {'; '.join(problems)}. Give the base and the encoder "
            "that it was trained with, or an adapter for these."
        )


def base_misfits(file: AdapterFile, widths: BaseWidths, base: str) -> list[str]:
    decoupled = file.kind == "decoupled"
    if widths.context == file.context_width and (not decoupled or widths.hosts == list(file.hidden)):
        return []
    found = f"the base {base} has {len(widths.hosts)} layers of context width {widths.context}"
    title = base_name(len(widths.hosts), widths.context)
    if (len(widths.hosts), widths.context) != (len(file.hidden), file.context_width):
        return [f"{found} ({title})"]
    order = "in another order" if sorted(widths.hosts) == sorted(file.hidden) else "of other inner widths"
    return [f"{found} as the adapter has, but {order} ({sorted(set(widths.hosts))} and {sorted(set(file.hidden))})"]


def encoder_misfits(file: AdapterFile, widths: EncoderWidths, encoder: str) -> list[str]:
    width = widths.pooled if file.uses == "pooled" else widths.patch
    needs = public_name(file.uses, file.feature_width)
    ask = f": give {needs}" if needs else ""
    if not width:
        return [f"the encoder {encoder} gives no {FEATURES[file.uses]}{ask}"]
    if width != file.feature_width:
        known = public_name(file.uses, width)
        title = f" as {known}" if known else ""
        return [
            f"the encoder {encoder} gives {FEATURES[file.uses]} of width {width}{title}, the adapter reads "
            f"{file.feature_width}{ask}"
        ]
    if file.head == "full" and widths.num_patches != file.num_tokens:
        return [f"the encoder {encoder} gives {widths.num_patches} patches, the adapter reads {file.num_tokens}"]
    return []
