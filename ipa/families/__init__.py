"""Frozen base models, one file per family: VAE, text encoders, denoiser, noise schedule, and the hosts for branches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipa.families.latent_diffusion import LatentDiffusion


def family_of(path: str, config: str | None = None, **ignored: Any) -> type[LatentDiffusion]:
    """The class that reads this base (folder, hub id or file); takes ``from_pretrained``'s arguments, reads no weight.

    Raises UserError for a base that no family reads, OSError for one that cannot be read.
    """
    from ipa.families.sdxl import StableDiffusionXL
    from ipa.families.sources import read_kind
    from ipa.families.stable_diffusion import StableDiffusion

    kinds: dict[str, type[LatentDiffusion]] = {family.name: family for family in (StableDiffusion, StableDiffusionXL)}
    return kinds[read_kind(path)]
