"""How many references a sample has, and which: one to N, of the pictures that a record offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

import torch

from ipa.data.addresses import Address
from ipa.errors import UserError

Picture = TypeVar("Picture")


@dataclass(frozen=True)
class References:
    """``chances`` are those of one reference, of two, of three …, in any unit."""

    chances: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        numbers: Any = self.chances if isinstance(self.chances, Sequence) else ["none"]
        if not all(isinstance(each, int | float) and each >= 0 for each in numbers) or not 0 < sum(numbers) < inf:
            raise UserError(
                f"data.references.chances={self.chances}: give the chances of one reference, of two and so on, "
                "as in [0.5,0.3,0.2]"
            )
        object.__setattr__(self, "chances", tuple(self.chances))  # not a view into a whole configuration

    @property
    def most(self) -> int:
        """N, to which batches are padded."""
        return max(n for n, chance in enumerate(self.chances, 1) if chance)

    def number(self, address: Address) -> int:
        """How many references this sample has, if there are as many."""
        if self.most == 1:
            return 1
        total = sum(self.chances)
        return address.choose("number of references", [(n, each / total) for n, each in enumerate(self.chances, 1)])

    def choose(self, offered: Sequence[Picture], address: Address) -> list[Picture]:
        """Different ones of those on offer, all if there are fewer; the first does not depend on the chances."""
        first = int(address.uniform("reference") * len(offered))
        number = self.number(address)
        if number == 1:
            return [offered[first]]
        others = [each for i, each in enumerate(offered) if i != first]
        order = torch.randperm(len(others), generator=address.generator("further references")).tolist()
        return [offered[first], *(others[i] for i in order[: number - 1])]
