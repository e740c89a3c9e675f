"""The published layouts of branches, one row each: names, shapes, and what its readers assume.

A family names its row (`ipa.contracts.Family.branches`), and a file of it is recognised by its tensors. The files of
families without a row are read by ipa alone.

Canonical names are ``ip_adapter.<n>.<rest>``, n = first + step × the number of the host. Some rows are ``written``
under other names: FLUX' in XLabs', which diffusers and XLabs' ComfyUI nodes both read.

Sources: diffusers' ``loaders/transformer_flux.py`` and ``transformer_sd3.py``; x-flux; ComfyUI-IPAdapter-Flux.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ipa.contracts import NoImage, TokenHead
from ipa.export.heads import HEADS, Metadata, Shapes, name_of

BRANCHES = "ip_adapter."
UNET = "unet"
BranchShapes = Mapping[str, tuple[int, ...]]  # of one branch, by the rest of the name


@dataclass(frozen=True)
class BranchRow:
    """``key`` is a tensor that tells this layout apart, ``title`` names the base for messages.

    ``shapes`` returns what one branch holds, for its inner width, the context width, and what the file has of the first
    branch. ``assumed`` returns the sizes, by the head's attributes, that the readers of a layout do not read from the
    file; None for a head that they do not know. ``no_image`` is what they take for "no image", None for the head's own.
    ``options`` are the base's options that a file requires.
    """

    title: str
    shapes: Callable[[int, int, BranchShapes], dict[str, tuple[int, ...]]]
    assumed: Callable[[TokenHead, str], dict[str, int] | None]
    key: str = ""
    first: int = 0
    step: int = 1
    no_image: NoImage | None = None
    written: tuple[tuple[str, str], ...] = ()
    options: Callable[[BranchShapes], dict[str, Any]] = lambda first: {}

    def number(self, host: int) -> int:
        return self.first + self.step * host


def unet_shapes(hidden: int, context: int, first: BranchShapes) -> dict[str, tuple[int, ...]]:
    return {f"to_{which}_ip.weight": (hidden, context) for which in "kv"}


def flux_shapes(hidden: int, context: int, first: BranchShapes) -> dict[str, tuple[int, ...]]:
    return unet_shapes(hidden, context, first) | {f"to_{which}_ip.bias": (hidden,) for which in "kv"}


def sd3_shapes(hidden: int, context: int, first: BranchShapes) -> dict[str, tuple[int, ...]]:
    time, head = first["norm_ip.linear.weight"][1], first["norm_q.weight"][0]
    return {
        **unet_shapes(hidden, context, first),
        "norm_ip.linear.weight": (2 * context, time),
        "norm_ip.linear.bias": (2 * context,),
        **{f"{name}.weight": (head,) for name in ("norm_q", "norm_k", "norm_ip_k")},
    }


def unet_assumed(head: TokenHead, layout: str) -> dict[str, int] | None:
    row = HEADS.get(name_of(head))
    return None if row is None or row.assumed is None else row.assumed(head, layout)


def flux_assumed(head: Any, layout: str) -> dict[str, int] | None:
    """diffusers knows 16 tokens by their total width of 65,536; XLabs' nodes also fix the encoder, CLIP ViT-L."""
    if name_of(head) != "global":
        return None
    sixteen = head.num_tokens == 16 and (layout == "comfyui" or 16 * head.context_width == 65536)
    return {"num_tokens": 16 if sixteen else 4} | ({"embedding_width": 768} if layout == "comfyui" else {})


def instantx_assumed(head: TokenHead, layout: str) -> dict[str, int] | None:
    return {"num_tokens": 128} if layout == "comfyui" and name_of(head) == "mlp" else None


def sd3_assumed(head: TokenHead, layout: str) -> dict[str, int] | None:
    if name_of(head) != "time_resampler":
        return None
    return {"depth": 4, "head_width": 64, "expansion": 4} | ({"num_tokens": 64} if layout == "comfyui" else {})


XLABS = (
    (r"image_proj\.(.+)", r"ip_adapter_proj_model.\1"),
    (r"ip_adapter\.(\d+)\.to_([kv])_ip\.(.+)", r"double_blocks.\1.processor.ip_adapter_double_stream_\2_proj.\3"),
)

ROWS: dict[str, BranchRow] = {
    "sd3": BranchRow(
        "Stable Diffusion 3",
        sd3_shapes,
        sd3_assumed,
        f"{BRANCHES}0.norm_ip.linear.weight",
        no_image="zeros",
        options=lambda first: {"time_width": first["norm_ip.linear.weight"][1]},
    ),
    "flux": BranchRow(
        "FLUX.1", flux_shapes, flux_assumed, f"{BRANCHES}0.to_k_ip.bias", no_image="black", written=XLABS
    ),
    "instantx": BranchRow(
        "FLUX.1, all blocks",
        unet_shapes,
        instantx_assumed,
        f"{BRANCHES}0.to_k_ip.weight",
        options=lambda first: {"hosts": "all"},
    ),
    UNET: BranchRow("a UNet", unet_shapes, unet_assumed, f"{BRANCHES}1.to_k_ip.weight", first=1, step=2),
}
# branches of families without a row, numbered as a UNet's
OTHER = BranchRow("another base", unet_shapes, lambda head, layout: None, first=1, step=2)
# families whose files do not name their row: the first ones of ipa, and published files
FAMILIES = {"": UNET, "stable_diffusion": UNET, "sdxl": UNET}


def row_of(branches: str) -> BranchRow:
    return ROWS.get(branches, OTHER)


def branches_in(shapes: Shapes, metadata: Metadata) -> str:
    """The name of a file's row: the metadata's, else by its tensors; empty for one that only ipa reads."""
    known = metadata.get("branches", FAMILIES.get(metadata.get("base_family", ""), ""))
    if metadata.get("branches") or metadata.get("base_family"):
        return known
    return next((name for name, row in ROWS.items() if row.key in shapes), UNET)


def written_name(name: str, branches: str) -> str:
    """Canonical name → that in a safetensors file."""
    for pattern, replacement in row_of(branches).written:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def first_branch(shapes: Shapes, row: BranchRow) -> dict[str, tuple[int, ...]]:
    """Shapes of the first branch, by the rest of their names."""
    prefix = f"{BRANCHES}{row.number(0)}."
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
