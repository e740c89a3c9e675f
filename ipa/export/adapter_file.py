"""What an adapter file is, told from the names and shapes in it before any weight is read.

    file = identify_file(Path("ip-adapter-plus_sdxl_vit-h.safetensors"))
    print(file.describe())  # a fine-grained IP-Adapter for Stable Diffusion XL (70 layers, context width 2048), …

Metadata is asked only for what shapes cannot tell; published files have none and are read as their authors' code does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from ipa import __version__
from ipa.adapter.heads import FullHead, GlobalHead, Head, ResamplerHead
from ipa.encoders import public_name
from ipa.errors import UserError
from ipa.export.storage import read_metadata, read_shapes

HEAD = "image_proj."
BRANCHES = "ip_adapter."
SD15, SD21, SDXL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL"
# by the number of layers and the context width; a simple adapter has no layers
BASES = {(16, 768): SD15, (16, 1024): SD21, (70, 2048): SDXL, (0, 768): SD15, (0, 1024): SD21, (0, 2048): SDXL}
HEADS: dict[str, type[Head]] = {"global": GlobalHead, "fine_grained": ResamplerHead, "full": FullHead}
WORDS = {"global": "global", "fine_grained": "fine-grained", "full": "full"}
FEATURES = {"pooled": "pooled embedding", "patches": "patch features"}
LAYERS = {"pooled": "projected", "patches": "penultimate"}
# what readers take for granted of a file without metadata
NO_IMAGE = {"global": "zeros", "fine_grained": "blank", "full": "blank"}
HEAD_WIDTH, FULL_TOKENS = 64, 257
# sizes of a head that a file must share with a training that starts from it
SIZES = {
    "global": ("num_tokens",),
    "fine_grained": ("num_tokens", "width", "heads", "depth", "head_width", "expansion"),
    "full": ("num_tokens",),
}
# what the file is, a pattern for one of its names, and a name that it does not have
FOREIGN = (
    ("an IP-Adapter FaceID Plus", r"image_proj\.perceiver_resampler\..*", ""),
    ("an IP-Adapter FaceID", r"image_proj\.norm\.weight", "image_proj.proj.weight"),
    ("an IP-Adapter for FLUX", r"ip_adapter\.\d+\.to_[kv]_ip\.bias|double_blocks\..*", ""),
    ("an IP-Adapter for Stable Diffusion 3", r"image_proj\.time_embedding\..*|ip_adapter\.\d+\.norm_ip\..*", ""),
    ("a base model", r"model\.diffusion_model\..*|down_blocks\..*", ""),
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ResamplerSizes:
    """As ``ResamplerHead`` takes them."""

    width: int
    heads: int
    depth: int
    head_width: int
    expansion: int


@dataclass(frozen=True)
class AdapterFile:
    """``hidden`` are the inner widths of the base's layers, in the published order; a simple adapter has none."""

    head: Literal["global", "fine_grained", "full"]
    kind: Literal["decoupled", "simple"]
    num_tokens: int
    context_width: int
    feature_width: int
    hidden: tuple[int, ...]
    no_image: str
    num_parameters: int
    num_tensors: int
    resampler: ResamplerSizes | None = None

    @property
    def uses(self) -> Literal["pooled", "patches"]:
        return HEADS[self.head].uses

    @property
    def base(self) -> str:
        """What the base is called, or how it looks when its sizes are those of no public one."""
        return base_name(len(self.hidden), self.context_width)

    @property
    def encoder(self) -> str:
        """What the image encoder is called, its feature width otherwise."""
        return public_name(self.uses, self.feature_width) or f"an encoder of width {self.feature_width}"

    def describe(self) -> str:
        """For messages: ``a global IP-Adapter for …``."""
        layers = f"{len(self.hidden)} layers, " if self.hidden else ""
        kind = "simple adapter" if self.kind == "simple" else "IP-Adapter"
        return (
            f"a {WORDS[self.head]} {kind} for {self.base} ({layers}context width {self.context_width}), "
            f"{self.num_tokens} tokens, which reads the {FEATURES[self.uses]} of {self.encoder} ({self.feature_width})"
        )

    def metadata(self) -> dict[str, str]:
        """What is worth to stand in a file of this kind, besides where it comes from."""
        sizes = {"head_width": str(self.resampler.head_width)} if self.resampler else {}
        return {
            "format": "ip-adapter",
            "head": self.head,
            "kind": self.kind,
            "num_tokens": str(self.num_tokens),
            "features": self.uses,
            "layer": LAYERS[self.uses],
            "no_image": self.no_image,
            "ipa_version": __version__,
        } | sizes


def identify_file(path: Path) -> AdapterFile:
    """``identify`` for a file on disk; raises UserError when it cannot be read."""
    return identify(read_shapes(path), read_metadata(path), str(path))


def identify(shapes: Shapes, metadata: Mapping[str, str] | None = None, source: str = "this file") -> AdapterFile:
    """Tell head, kind and sizes; raises UserError for what ipa does not read, with the reason, and for gaps."""
    refuse_foreign(shapes, source)
    try:
        file = read_sizes(shapes, metadata or {})
        expected = expected_shapes(file)
    except (KeyError, IndexError, ValueError, ArithmeticError) as error:
        missing = f"no {error.args[0]} in it" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{source} is no IP-Adapter that ipa reads: {missing}") from error
    gaps = differences(shapes, expected)
    if gaps:
        raise UserError(f"{source} looks like {file.describe()}, but {'; '.join(gaps)}: it is damaged or foreign")
    return file


def refuse_foreign(shapes: Shapes, source: str) -> None:
    for what, pattern, absent in FOREIGN:
        if absent not in shapes and any(re.fullmatch(pattern, name) for name in shapes):
            raise UserError(
                f"{source} is {what}, which ipa does not read. It reads IP-Adapters (global, plus and full) for "
                f"{SD15}, 2.x and XL."
            )


def read_sizes(shapes: Shapes, metadata: Mapping[str, str]) -> AdapterFile:
    """Raises KeyError for a name that should be there and ValueError for sizes that make no sense."""
    head = head_of(shapes)
    layers = sum(name.startswith(BRANCHES) and name.endswith(".to_k_ip.weight") for name in shapes)
    tokens, context, features, resampler = HEAD_SIZES[head](shapes, metadata)
    return AdapterFile(
        head=cast(Literal["global", "fine_grained", "full"], head),
        kind="decoupled" if any(name.startswith(BRANCHES) for name in shapes) else "simple",
        num_tokens=tokens,
        context_width=context,
        feature_width=features,
        hidden=tuple(shapes[f"{BRANCHES}{2 * layer + 1}.to_k_ip.weight"][0] for layer in range(layers)),
        no_image=metadata.get("no_image") or NO_IMAGE[head],
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        num_tensors=len(shapes),
        resampler=resampler,
    )


def head_of(shapes: Shapes) -> str:
    """As diffusers tells them apart."""
    for head, name in {"global": "proj.weight", "full": "proj.3.weight", "fine_grained": "latents"}.items():
        if f"{HEAD}{name}" in shapes:
            return head
    found = ", ".join(sorted(shapes)[:3]) or "nothing"
    raise UserError(f"none of {HEAD}proj.weight, {HEAD}proj.3.weight, {HEAD}latents in it, but {found} …")


# tokens, context width, feature width, and the rest of a resampler
Sizes = tuple[int, int, int, ResamplerSizes | None]


def global_sizes(shapes: Shapes, metadata: Mapping[str, str]) -> Sizes:
    rows, features = shapes[f"{HEAD}proj.weight"]
    context = shapes[f"{HEAD}norm.weight"][0]
    return rows // context, context, features, None


def full_sizes(shapes: Shapes, metadata: Mapping[str, str]) -> Sizes:
    tokens = read_number(metadata, "num_tokens", FULL_TOKENS)
    return tokens, shapes[f"{HEAD}proj.3.weight"][0], shapes[f"{HEAD}proj.0.weight"][1], None


def fine_grained_sizes(shapes: Shapes, metadata: Mapping[str, str]) -> Sizes:
    _, tokens, width = shapes[f"{HEAD}latents"]
    head_width = read_number(metadata, "head_width", HEAD_WIDTH)
    inner = shapes[f"{HEAD}layers.0.0.to_q.weight"][0]
    if inner % head_width:
        raise UserError(f"its resampler's attention is {inner} wide, which is no multiple of head_width={head_width}")
    resampler = ResamplerSizes(
        width=width,
        heads=inner // head_width,
        depth=sum(name.startswith(f"{HEAD}layers.") and name.endswith(".0.to_q.weight") for name in shapes),
        head_width=head_width,
        expansion=shapes[f"{HEAD}layers.0.1.1.weight"][0] // width,
    )
    return tokens, shapes[f"{HEAD}proj_out.weight"][0], shapes[f"{HEAD}proj_in.weight"][1], resampler


HEAD_SIZES = {"global": global_sizes, "full": full_sizes, "fine_grained": fine_grained_sizes}


def read_number(metadata: Mapping[str, str], name: str, published: int) -> int:
    """A size out of the metadata, ``published`` where it says nothing; raises UserError."""
    text = metadata.get(name) or str(published)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"its metadata says {name}={text}, which is no size")
    return int(text)


def make_head(file: AdapterFile) -> Head:
    """A new head of the file's sizes."""
    common: dict[str, Any] = {
        "context_width": file.context_width,
        "num_tokens": file.num_tokens,
        "no_image": file.no_image,
    }
    if file.resampler is None:
        return HEADS[file.head](file.feature_width, **common)
    return ResamplerHead(file.feature_width, **common, **vars(file.resampler))


def expected_shapes(file: AdapterFile) -> dict[str, tuple[int, ...]]:
    """All that a file of these sizes has to hold."""
    with torch.device("meta"):
        head = {f"{HEAD}{name}": tuple(tensor.shape) for name, tensor in make_head(file).state_dict().items()}
    branches = {
        f"{BRANCHES}{2 * layer + 1}.to_{which}_ip.weight": (hidden, file.context_width)
        for layer, hidden in enumerate(file.hidden)
        for which in "kv"
    }
    return head | branches


def differences(shapes: Shapes, expected: Shapes) -> list[str]:
    """What is missing, unknown or misshapen, one example each, in words."""
    found = {
        "it lacks": [name for name in expected if name not in shapes],
        "it also holds": [name for name in shapes if name not in expected],
    }
    told = [f"{words} {first(names)}" for words, names in found.items() if names]
    other = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    return told + [f"{name} has the shape {shapes[name]} instead of {expected[name]}" for name in other[:1]]


def first(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]


def base_name(layers: int, context_width: int) -> str:
    """What a base with so many layers of this context width is called."""
    return BASES.get((layers, context_width), "a base of other sizes")
