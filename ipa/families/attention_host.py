"""An attention layer of a diffusers model as a host: its branches are plugged into the layer's processor.

Letters here: Q queries (latent cells), M heads, d head width; the rest as in ``ipa.types``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor, nn

from ipa.types import Channel, ImagePrompt

REFERENCE_WIDTH = 1280  # of the layers for which "C penalty" does not change λ
Once = Callable[[Hashable, Callable[[], Any]], Any]


def every_time(key: Hashable, make: Callable[[], Any]) -> Any:
    """``ImagePrompt.once`` for tokens without a prompt: nothing is kept."""
    return make()


class AttentionBranch(nn.Module):
    """λ · Attention(Q, K′, V′) with K′ = W′_k c and V′ = W′_v c; a subclass initialises the weights."""

    def __init__(self, heads: int, context_width: int, inner_width: int, device: Any, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_k_ip = nn.Linear(context_width, inner_width, bias, device, torch.float32)
        self.to_v_ip = nn.Linear(context_width, inner_width, bias, device, torch.float32)

    def forward(
        self,
        query_BMQd: Tensor,
        tokens_BTD: Tensor,
        time: Tensor | None,
        scale: Tensor,
        once: Once = every_time,
        scaling: str = "V only",
        present_BT: Tensor | None = None,
    ) -> Tensor:
        """Return λ · Attention(Q, K′, V′) as B × Q × (M d). The time embedding is not used.

        Tokens that are not present have logits of −∞.
        """
        dtype = query_BMQd.dtype
        key_BMTd, value_BMTd = once((self, dtype), lambda: self.project(tokens_BTD, dtype))
        if scaling != "V only":
            key_BMTd, value_BMTd = scale_keys_and_values(key_BMTd, value_BMTd, scale, scaling)
            scale = (scale != 0).to(scale)  # λ = 0 must be an exact zero
        mask_B11T = None if present_BT is None else present_BT[:, None, None]
        attended = F.scaled_dot_product_attention(query_BMQd, key_BMTd, value_BMTd, attn_mask=mask_B11T)
        return scale.to(attended.dtype) * join_heads(attended)

    def project(self, tokens_BTD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K′ and V′, both B × M × T × d."""
        key, value = self.to_k_ip(tokens_BTD), self.to_v_ip(tokens_BTD)
        return split_heads(key, self.heads).to(dtype), split_heads(value, self.heads).to(dtype)


def scale_keys_and_values(key_BMTd: Tensor, value_BMTd: Tensor, scale: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """λ inside the softmax, as in ComfyUI_IPAdapter_plus (`ipa.presets.SCALINGS`); C is the layer's width.

    K+V                            Attention(Q, λ K′, λ V′)
    K+V w/ C penalty               the same with w = λ C / 1280
    K+mean(V) w/ C penalty         Attention(Q, w K′, V′ − V̄′ + w V̄′), V̄′ the mean over the tokens
    """
    width = key_BMTd.shape[1] * key_BMTd.shape[3]
    weight = scale.to(key_BMTd) * (width / REFERENCE_WIDTH if "penalty" in how else 1.0)
    weight = weight[..., None] if weight.ndim else weight
    if how.startswith("K+V"):
        return weight * key_BMTd, weight * value_BMTd
    mean = value_BMTd.mean(2, keepdim=True)
    return weight * key_BMTd, value_BMTd - mean + weight * mean


class BranchProcessor:
    """Replaces a layer's processor; has the branch and the channel of each adapter that is plugged in.

    Subclasses compute the layer's attention with the branches. Without a prompt for this layer they call the
    ``replaced`` processor.
    """

    def __init__(self, host: str, replaced: Any) -> None:
        self.host = host
        self.replaced = replaced
        self.branches: list[tuple[nn.Module, Channel]] = []

    def acting(self) -> list[tuple[nn.Module, ImagePrompt]]:
        """The branches with the prompts that they see now."""
        return [(branch, prompt) for branch, channel in self.branches for prompt in channel.at(self.host)]

    def added(self, prompt: ImagePrompt, own_BQC: Tensor, image_BQC: Tensor) -> Tensor:
        """What a branch adds: ``image``, limited to the prompt's mask if there is one.

        ``own`` is the layer's attention without the branch, for the prompt's ``watch``.
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
