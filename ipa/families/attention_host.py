"""An attention layer of a diffusers model as a host for image branches: plugged into the layer's processor.

Letters here: Q queries (latent cells), M heads, d head width; the rest as in ``ipa.types``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor, nn

from ipa.types import Channel, ImagePrompt

Once = Callable[[Hashable, Callable[[], Any]], Any]


def every_time(key: Hashable, make: Callable[[], Any]) -> Any:
    """``ImagePrompt.once`` for tokens without a prompt: nothing is kept."""
    return make()


class BranchProcessor:
    """Replaces a layer's processor, with the branch and the channel of each adapter that is plugged in there.

    Subclasses compute the layer's attention with the branches. Without a prompt for this layer they call the processor
    that was ``replaced``.
    """

    def __init__(self, host: str, replaced: Any) -> None:
        self.host = host
        self.replaced = replaced
        self.branches: list[tuple[nn.Module, Channel]] = []

    def acting(self) -> list[tuple[nn.Module, ImagePrompt]]:
        """The branches with the prompts that they see now."""
        return [(branch, prompt) for branch, channel in self.branches for prompt in channel.at(self.host)]

    def added(self, prompt: ImagePrompt, own_BQC: Tensor, image_BQC: Tensor) -> Tensor:
        """What a branch adds: ``image``, limited to the prompt's mask if it has one.

        ``own`` is the layer's attention without the branch, which the prompt's ``watch`` compares it with.
        """
        if prompt.mask_BHW is not None:
            image_BQC = image_BQC * mask_of(prompt, *image_BQC.shape[:2]).to(image_BQC)
        if prompt.watch is not None:
            prompt.watch(self.host, own_BQC, image_BQC)
        return image_BQC


class AttentionHost(ABC):
    """``block`` is the name of the block that the layer belongs to."""

    processor_class: ClassVar[type[BranchProcessor]]

    def __init__(self, name: str, attention: Any, block: str) -> None:
        self.name, self.attention, self.block = name, attention, block
        self._branch: tuple[nn.Module, Channel] | None = None

    @property
    def width(self) -> int:
        return self.attention.to_k.out_features

    @abstractmethod
    def make_branch(self) -> nn.Module: ...

    def plug(self, branch: nn.Module, channel: Channel) -> None:
        if self._branch is not None:
            raise RuntimeError(f"{self.name} already has this adapter's branch; call remove() first")
        processor: Any = self.attention.processor
        if not isinstance(processor, BranchProcessor):
            processor = self.processor_class(self.name, processor)
            self.attention.processor = processor
        self._branch = (branch, channel)
        processor.branches.append(self._branch)

    def unplug(self) -> None:
        processor: Any = self.attention.processor
        if self._branch is None:
            return
        processor.branches.remove(self._branch)
        self._branch = None
        if not processor.branches:
            self.attention.processor = processor.replaced


def mask_of(prompt: ImagePrompt, batch: int, queries: int) -> Tensor:
    """The prompt's mask on a layer's grid, B × Q × 1, resized as diffusers does."""
    mask_BHW = prompt.mask_BHW
    assert mask_BHW is not None
    return prompt.once(
        ("mask", queries), lambda: IPAdapterMaskProcessor.downsample(mask_BHW, batch, queries, value_embed_dim=1)
    )


def split_heads(states_BNC: Tensor, heads: int) -> Tensor:
    """B × N × (M d) → B × M × N × d."""
    return states_BNC.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(states_BMNd: Tensor) -> Tensor:
    """B × M × N × d → B × N × (M d)."""
    return states_BMNd.transpose(1, 2).flatten(2)
