"""Frozen base models, one file per family: VAE, text encoders, denoiser, noise path, and the hosts for branches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ipa.errors import UserError

if TYPE_CHECKING:
    from ipa.contracts import Family

EXTRA: list[type[Family]] = []  # families from outside this package, asked first


def families() -> list[type[Family]]:
    """Every known family; a new one needs a line here."""
    from ipa.families.chroma import Chroma
    from ipa.families.flux import Flux
    from ipa.families.sd3 import StableDiffusion3
    from ipa.families.sdxl import StableDiffusionXL
    from ipa.families.stable_diffusion import StableDiffusion

    return [*EXTRA, StableDiffusion, StableDiffusionXL, Flux, Chroma, StableDiffusion3]


def family_of(path: str, config: str | None = None, *, key: str = "base.path", **ignored: Any) -> type[Family]:
    """The class that reads this base (folder, hub id or file); takes ``from_pretrained``'s arguments, reads no weight.

    ``key`` names the option in messages. Raises UserError for a base that no family reads or that cannot be read.
    """
    for family in families():
        if family.recognises(path, key):
            return family
    known = ", ".join(f"{family.title} ({family.advice})" for family in families())
    raise UserError(
        f"{key}={path} is none of the bases that ipa knows: {known}; those that read a second image "
        "(inpainting, Fill, Depth, Canny) are not supported"
    )
