"""The published layouts: `image_proj.<k>` and `ip_adapter.<n>.to_{k,v}_ip.weight`; which base and encoder fit a file.

``<n>`` is the position in the base's list of attention processors. In a UNet's, self-attention takes the even numbers:
the i-th cross-attention layer, in the order down, up, mid, is number 2 i + 1. Transformers number their blocks from 0
(`ipa.export.branches`). A simple adapter has the first part only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ipa.encoders import PUBLIC
from ipa.errors import UserError
from ipa.export.adapter_file import FEATURES, AdapterFile, base_name, identify
from ipa.export.branches import BRANCHES, UNET, branches_in, row_of, written_name
from ipa.export.storage import SAFETENSORS, save_adapter
from ipa.types import BaseWidths, EncoderWidths


def to_published(
    trainable: Mapping[str, Tensor], dtype: torch.dtype = torch.float16, branches: str = UNET
) -> dict[str, Tensor]:
    """State of the trainable set (`image_proj.…`, `ip_adapter.branches.<i>.…`) → canonical names of its layout."""
    return {publish_name(name, branches): tensor.to(dtype) for name, tensor in trainable.items()}


def from_published(
    tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, branches: str = UNET
) -> dict[str, Tensor]:
    """Canonical names → state of the trainable set in one ``dtype``, whatever the file mixes."""
    return {unpublish_name(name, branches): tensor.to(dtype) for name, tensor in tensors.items()}


def publish_name(name: str, branches: str = UNET) -> str:
    found = re.fullmatch(r"ip_adapter\.branches\.(\d+)\.(.+)", name)
    return f"{BRANCHES}{row_of(branches).number(int(found[1]))}.{found[2]}" if found else name


def unpublish_name(name: str, branches: str = UNET) -> str:
    found = re.fullmatch(r"ip_adapter\.(\d+)\.(.+)", name)
    row = row_of(branches)
    return f"{BRANCHES}branches.{(int(found[1]) - row.first) // row.step}.{found[2]}" if found else name


def write_adapter(path: Path, published: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Save an adapter with its metadata, under the names that other programs read. Raises UserError.

    A ``.bin`` keeps the canonical names, since its readers look for them.
    """
    full = with_metadata(published, metadata)
    branches = branches_in({name: tuple(tensor.shape) for name, tensor in published.items()}, full)
    if path.suffix == SAFETENSORS:
        published = {written_name(name, branches): tensor for name, tensor in published.items()}
    save_adapter(path, published, full)


def with_metadata(published: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` with head, kind and sizes, as the tensors show them: the metadata of a file of them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in published.items()}
    return {**metadata, **identify(shapes, metadata, "the adapter").metadata()}


def check_fits(
    file: AdapterFile, base_widths: BaseWidths, encoder_widths: EncoderWidths, *, source: str, base: str, encoder: str
) -> None:
    """Compare a file with a base and an encoder before any weight is read; one UserError lists all misfits.

    ``source``, ``base`` and ``encoder`` are the names that the user gave.
    """
    if problems := base_misfits(file, base_widths, base) + encoder_misfits(file, encoder_widths, encoder):
        raise UserError(
            f"{source} is {file.describe()}. It does not fit: {'; '.join(problems)}. Give the base and the encoder "
            "that it was trained with, or an adapter for these."
        )


def base_misfits(file: AdapterFile, widths: BaseWidths, base: str) -> list[str]:
    decoupled = file.kind == "decoupled"
    context = widths.context if decoupled else widths.text or widths.context
    same_layout = not (decoupled and widths.branches and file.branches) or widths.branches == file.branches
    if context == file.context_width and same_layout and (not decoupled or widths.hosts == list(file.hidden)):
        return []
    found = f"the base {base} has {len(widths.hosts)} layers of context width {context}"
    title = base_name(len(widths.hosts), context, widths.branches)
    if not same_layout:
        return [f"{found} ({title}), whose branches are others"]
    if (len(widths.hosts), context) != (len(file.hidden), file.context_width):
        return [f"{found} ({title})"]
    order = "in another order" if sorted(widths.hosts) == sorted(file.hidden) else "of other inner widths"
    return [f"{found} as the adapter has, but {order} ({sorted(set(widths.hosts))} and {sorted(set(file.hidden))})"]


def encoder_misfits(file: AdapterFile, widths: EncoderWidths, encoder: str) -> list[str]:
    width = widths.pooled if file.uses == "pooled" else widths.patch
    needs = PUBLIC.get((file.uses, file.feature_width))
    ask = f": give {needs}" if needs else ""
    if not width:
        return [f"the encoder {encoder} gives no {FEATURES[file.uses]}{ask}"]
    if width != file.feature_width:
        known = PUBLIC.get((file.uses, width))
        title = f" as {known}" if known else ""
        return [
            f"the encoder {encoder} gives {FEATURES[file.uses]} of width {width}{title}, the adapter reads "
            f"{file.feature_width}{ask}"
        ]
    if file.head == "full" and widths.num_patches != file.num_tokens:
        return [f"the encoder {encoder} gives {widths.num_patches} patches, the adapter reads {file.num_tokens}"]
    return []
