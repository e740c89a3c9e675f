"""Recognises what an adapter file is from names and shapes, before any weight is read.

    file = identify(shapes, metadata, source="ip-adapter-plus_sdxl_vit-h.safetensors")
    print(file.describe())  # a fine-grained IP-Adapter for Stable Diffusion XL (70 layers, context width 2048), …

Metadata are used only where shapes say nothing. Published files have none and are read as their authors' code does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ipa import __version__
from ipa.contracts import TokenHead
from ipa.encoders import PUBLIC
from ipa.errors import UserError
from ipa.export.branches import BRANCHES, UNET, branches_in, first_branch, row_of
from ipa.export.heads import HEAD, HEADS, Metadata, Shapes, recognise

SD15, SD21, SDXL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL"
# by the number of layers and the context width; a simple adapter has no layers
BASES = {
    (16, 768): SD15,
    (16, 1024): SD21,
    (70, 2048): SDXL,
    (0, 768): SD15,
    (0, 1024): SD21,
    (0, 2048): SDXL,
    (19, 4096): "FLUX.1",
    (57, 4096): "FLUX.1 (all blocks)",
    (24, 1536): "Stable Diffusion 3 Medium",
    (37, 1536): "Stable Diffusion 3.5 Medium",
    (38, 2432): "Stable Diffusion 3.5 Large",
}
FEATURES = {"pooled": "pooled embedding", "patches": "patch features"}
LAYERS = {"pooled": "projected", "patches": "penultimate"}
# what the file is, a pattern for one of its names, and names that it does not have
FOREIGN: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("an IP-Adapter FaceID Plus", r"image_proj\.perceiver_resampler\..*", ()),
    ("an IP-Adapter FaceID", r"image_proj\.norm\.weight", ("image_proj.proj.weight", "ip_adapter.0.to_k_ip.weight")),
    ("a base model", r"model\.diffusion_model\..*|down_blocks\..*", ()),
)


@dataclass(frozen=True)
class AdapterFile:
    """``hidden`` are the inner widths of the base's layers, in the published order; a simple adapter has none.

    ``head`` names a row of `ipa.export.heads.HEADS`, ``sizes`` is what that head's constructor takes besides.
    ``branches`` names a row of `ipa.export.branches.ROWS`, empty for a layout that only ipa reads; ``base_options`` are
    the options that a base needs for it. ``layer`` comes from the metadata.
    """

    head: str
    kind: Literal["decoupled", "simple"]
    feature_width: int
    sizes: dict[str, int]
    hidden: tuple[int, ...]
    no_image: str
    layer: str
    num_parameters: int
    num_tensors: int
    branches: str = UNET
    base_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.sizes["num_tokens"]

    @property
    def context_width(self) -> int:
        return self.sizes["context_width"]

    @property
    def uses(self) -> Literal["pooled", "patches"]:
        return HEADS[self.head].cls.uses

    @property
    def base(self) -> str:
        """The base's name, or how its sizes compare with public ones."""
        return base_name(len(self.hidden), self.context_width, self.branches)

    @property
    def encoder(self) -> str:
        """The name of the image encoder, or its feature width."""
        name = PUBLIC.get((self.uses, self.feature_width))
        return f"{name} ({self.feature_width})" if name else f"an encoder of width {self.feature_width}"

    def describe(self) -> str:
        """For messages: ``a global IP-Adapter for …``."""
        layers = f"{len(self.hidden)} layers, " if self.hidden else ""
        kind = "simple adapter" if self.kind == "simple" else "IP-Adapter"
        return (
            f"a {HEADS[self.head].title} {kind} for {self.base} ({layers}context width {self.context_width}), "
            f"{self.num_tokens} tokens, which reads the {FEATURES[self.uses]} of {self.encoder}"
        )

    def metadata(self) -> dict[str, str]:
        """Metadata that describe the file itself, not its training."""
        return {
            "format": "ip-adapter",
            "head": self.head,
            "kind": self.kind,
            "num_tokens": str(self.num_tokens),
            "features": self.uses,
            "layer": self.layer,
            "no_image": self.no_image,
            "ipa_version": __version__,
            **{name: str(self.sizes[name]) for name in HEADS[self.head].recorded},
        }


def identify(shapes: Shapes, metadata: Mapping[str, str] | None = None, source: str = "this file") -> AdapterFile:
    """Recognise head, kind and sizes; raises UserError, with the reason, for a file that ipa does not read."""
    metadata = metadata or {}
    if branches_in(shapes, metadata) and metadata.get("head") not in HEADS:
        refuse_foreign(shapes, source)
    try:
        file = read_sizes(shapes, metadata)
        expected = expected_shapes(file, shapes)
    except (KeyError, IndexError, ValueError, ArithmeticError) as error:
        missing = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{source} is not an IP-Adapter that ipa reads: {missing}") from error
    if file.kind == "decoupled" and not file.hidden:
        raise UserError(
            f"{source} has an IP-Adapter's head but no branches (ip_adapter.…): the conversion that made it lost them. "
            "Give ipa.tools.export the checkpoint itself. Only metadata with kind=simple makes it a simple adapter"
        )
    if gaps := differences(shapes, expected):
        raise UserError(f"{source} looks like {file.describe()}, but {'; '.join(gaps)}: it is damaged or foreign")
    return file


def refuse_foreign(shapes: Shapes, source: str) -> None:
    for what, pattern, absent in FOREIGN:
        if not any(name in shapes for name in absent) and any(re.fullmatch(pattern, name) for name in shapes):
            raise UserError(
                f"{source} is {what}, which ipa does not read. It reads IP-Adapters (global, plus and full) for "
                f"{SD15}, 2.x and XL, FLUX.1 and Stable Diffusion 3."
            )


def read_sizes(shapes: Shapes, metadata: Metadata) -> AdapterFile:
    """Raises KeyError for a name that should be there, UserError or ValueError for impossible sizes."""
    head, branches = recognise(shapes, metadata), branches_in(shapes, metadata)
    row, layout = HEADS[head], row_of(branches)
    feature_width, sizes = row.read(shapes, metadata)
    layers = sum(name.startswith(BRANCHES) and name.endswith(".to_k_ip.weight") for name in shapes)
    return AdapterFile(
        head=head,
        kind="simple" if metadata.get("kind") == "simple" else "decoupled",
        feature_width=feature_width,
        sizes=sizes,
        hidden=tuple(shapes[f"{BRANCHES}{layout.number(layer)}.to_k_ip.weight"][0] for layer in range(layers)),
        no_image=metadata.get("no_image") or layout.no_image or row.no_image,
        layer=metadata.get("layer") or LAYERS[row.cls.uses],
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        num_tensors=len(shapes),
        branches=branches,
        base_options=(layout.options(first_branch(shapes, layout)) if layers else {}) | without_t5(metadata),
    )


def without_t5(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What Stable Diffusion 3 needs to know of an adapter that was trained without its T5."""
    return {"t5": False} if metadata.get("t5") == "false" else {}


def make_head(file: AdapterFile) -> TokenHead:
    """A new head of the file's sizes."""
    cls: Any = HEADS[file.head].cls
    return cls(file.feature_width, no_image=file.no_image, **file.sizes)


def expected_shapes(file: AdapterFile, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors of a file of these sizes. Branches of unknown layouts are checked when they are loaded."""
    with torch.device("meta"):
        head = {f"{HEAD}{name}": tuple(tensor.shape) for name, tensor in make_head(file).state_dict().items()}
    if not file.branches:
        return head | {name: shape for name, shape in shapes.items() if name.startswith(BRANCHES)}
    row = row_of(file.branches)
    first = first_branch(shapes, row)
    branches = {
        f"{BRANCHES}{row.number(layer)}.{name}": shape
        for layer, hidden in enumerate(file.hidden)
        for name, shape in row.shapes(hidden, file.context_width, first).items()
    }
    return head | branches


def differences(shapes: Shapes, expected: Shapes) -> list[str]:
    """What is missing, unknown or misshapen, in words, with one example each."""
    found = {
        "it lacks": [name for name in expected if name not in shapes],
        "it also holds": [name for name in shapes if name not in expected],
    }
    gaps = [f"{words} {first(names)}" for words, names in found.items() if names]
    other = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    return gaps + [f"{name} has the shape {shapes[name]} instead of {expected[name]}" for name in other[:1]]


def first(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]


def base_name(layers: int, context_width: int, branches: str = UNET) -> str:
    """The name of a base with so many layers of this context width."""
    other = "a base" if branches in (UNET, "") else row_of(branches).title
    return BASES.get((layers, context_width), f"{other} of other sizes")
