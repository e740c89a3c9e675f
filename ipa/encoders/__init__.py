"""Frozen image encoders: a reference image in, features out.

Importing this package imports no library; the classes are in `ipa.encoders.open_clip` and `ipa.encoders.vision_model`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipa.errors import UserError

if TYPE_CHECKING:
    from ipa.encoders.image_encoder import ImageEncoder
    from ipa.types import EncoderWidths

# for messages: encoders of published adapters and related ones, by the features that a head reads and their width
PUBLIC: dict[tuple[str, int], str] = {
    ("pooled", 768): "CLIP ViT-L/14 (openai)",
    ("pooled", 1024): "OpenCLIP ViT-H/14 (laion2b_s32b_b79k)",
    ("pooled", 1280): "OpenCLIP ViT-bigG/14 (laion2b_s39b_b160k)",
    ("patches", 1024): "CLIP ViT-L/14 (openai)",
    ("patches", 1280): "OpenCLIP ViT-H/14 (laion2b_s32b_b79k)",
    ("patches", 1664): "OpenCLIP ViT-bigG/14 (laion2b_s39b_b160k)",
}

# encoders of other libraries by the prefix of their source; ``from_pretrained`` takes path, dtype and layer
EXTRA: dict[str, type[ImageEncoder]] = {}


def open_encoder(
    source: str, weights: str | None = None, dtype: str = "float32", layer: str | None = None
) -> ImageEncoder:
    """The encoder that an adapter's metadata identifies by ``encoder``, ``encoder_weights`` and ``layer``.

    ``source`` is an open_clip name, ``local-dir:FOLDER``, ``hf-hub:…``, or a transformers folder or hub id. Raises
    UserError.
    """
    encoder_class, arguments = resolve(source, weights, layer)
    return encoder_class.from_pretrained(dtype=dtype, **arguments)


def read_widths(source: str, weights: str | None = None, layer: str | None = None) -> EncoderWidths:
    """Widths of what ``open_encoder`` would load, from its configuration alone."""
    encoder_class, arguments = resolve(source, weights, layer)
    return encoder_class.read_widths(**arguments)


def resolve(source: str, weights: str | None, layer: str | None) -> tuple[Any, dict[str, Any]]:
    """The class that loads ``source``, and its arguments."""
    from ipa.encoders.image_encoder import read_layer

    for prefix, encoder_class in EXTRA.items():
        if source.startswith(prefix):
            return encoder_class, {"path": source, "layer": read_layer(layer)}
    if not is_transformers(source, weights):
        from ipa.encoders.open_clip import OpenClipEncoder

        return OpenClipEncoder, {"name": source, "pretrained": weights, "layer": read_layer(layer)}
    from ipa.encoders.vision_model import VisionModelEncoder

    return VisionModelEncoder, {"path": source, "layer": read_layer(layer)}


def is_transformers(source: str, weights: str | None = None) -> bool:
    """Whether ``source`` is a path in transformers' layout; raises UserError if such a path has ``weights`` too."""
    if source.startswith(("local-dir:", "hf-hub:")):
        return False
    is_path = "/" in source or (Path(source) / "config.json").is_file()
    if is_path and weights:
        raise UserError(f"the encoder {source} has its own weights: omit {weights}, or give an open_clip name")
    return is_path
