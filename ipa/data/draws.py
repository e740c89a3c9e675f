"""The random numbers that training needs for a sample, each kind from its own stream at the sample's address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ipa.data.addresses import Address
from ipa.errors import UserError
from ipa.types import Draws


@dataclass(frozen=True)
class DropRates:
    """Shares of samples that lose the text only, the image only, or both (Ye et al. 2023, section 4.1: 5 % each)."""

    text: float = 0.05
    image: float = 0.05
    both: float = 0.05

    def __post_init__(self) -> None:
        rates = (self.text, self.image, self.both)
        if not all(isinstance(rate, int | float) for rate in rates) or not (min(rates) >= 0 and sum(rates) <= 1):
            raise UserError(f"drop rates must be at least 0 and sum to at most 1, not {self}")

    def drops(self, u: float) -> tuple[bool, bool]:
        """One joint draw: u in [0, 1) → (drop the text, drop the image)."""
        both = self.text + self.image <= u < self.text + self.image + self.both
        return u < self.text or both, self.text <= u < self.text + self.image or both


NO_DROPS = DropRates(0, 0, 0)


def draw(addresses: Sequence[Address], latent_shape: tuple[int, int, int], rates: DropRates) -> Draws:
    """Row b of every tensor belongs to ``addresses[b]``; ``latent_shape`` is (C, H, W)."""

    def normal(name: str) -> torch.Tensor:
        return torch.stack([torch.randn(latent_shape, generator=address.generator(name)) for address in addresses])

    drops = [rates.drops(uniform(address, "drop")) for address in addresses]
    return Draws(
        posterior_noise_BCHW=normal("posterior"),
        noise_BCHW=normal("noise"),
        time_B=torch.tensor([uniform(address, "time") for address in addresses]),
        drop_text_B=torch.tensor([text for text, _ in drops]),
        drop_image_B=torch.tensor([image for _, image in drops]),
    )


def uniform(address: Address, name: str) -> float:
    """A number in [0, 1), exact in float32."""
    return torch.rand((), generator=address.generator(name)).item()
