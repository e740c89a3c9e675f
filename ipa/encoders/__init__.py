"""Frozen image encoders: a reference picture in, features out.

Importing this package imports no library; the classes are in `ipa.encoders.open_clip` and `ipa.encoders.clip_vision`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ipa.errors import UserError

if TYPE_CHECKING:
    from ipa.encoders.image_encoder import ImageEncoder, Uses
    from ipa.types import EncoderWidths

# the encoders of the published adapters and their neighbours, by what a head reads and its width
PUBLIC = {
    ("pooled", 768): "CLIP ViT-L/14 (openai)",
    ("pooled", 1024): "OpenCLIP ViT-H/14 (laion2b_s32b_b79k)",
    ("pooled", 1280): "OpenCLIP ViT-bigG/14 (laion2b_s39b_b160k)",
    ("patches", 1024): "CLIP ViT-L/14 (openai)",
    ("patches", 1280): "OpenCLIP ViT-H/14 (laion2b_s32b_b79k)",
    ("patches", 1664): "OpenCLIP ViT-bigG/14 (laion2b_s39b_b160k)",
}


def open_encoder(source: str, weights: str | None = None, dtype: str = "float32") -> ImageEncoder:
    """The encoder that an adapter's metadata names with ``encoder`` and ``encoder_weights``.

    ``source`` is an open_clip name, ``local-dir:FOLDER``, ``hf-hub:…``, or a transformers folder or hub path.
    Raises UserError with a message for the user.
    """
    if is_transformers(source, weights):
        from ipa.encoders.clip_vision import ClipVisionEncoder

        return ClipVisionEncoder.from_pretrained(source, dtype=dtype)
    from ipa.encoders.open_clip import OpenClipEncoder

    return OpenClipEncoder.from_pretrained(source, weights, dtype)


def read_widths(source: str, weights: str | None = None) -> EncoderWidths:
    """Widths of what ``open_encoder`` would load, from its configuration alone."""
    if is_transformers(source, weights):
        from ipa.encoders.clip_vision import ClipVisionEncoder

        return ClipVisionEncoder.read_widths(source)
    from ipa.encoders.open_clip import OpenClipEncoder

    return OpenClipEncoder.read_widths(source, weights)


def is_transformers(source: str, weights: str | None = None) -> bool:
    """Whether ``source`` is a path in transformers' layout; raises UserError for one with weights named apart."""
    if source.startswith(("local-dir:", "hf-hub:")):
        return False
    is_path = "/" in source or (Path(source) / "config.json").is_file()
    if is_path and weights:
        raise UserError(f"the encoder {source} has its own weights: leave out {weights}, or give an open_clip name")
    return is_path


def public_name(uses: Uses, width: int) -> str | None:
    """The public encoder whose features of this kind have this width, for error messages."""
    return PUBLIC.get((uses, width))
