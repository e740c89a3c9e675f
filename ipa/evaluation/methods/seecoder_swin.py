"""The Swin transformer as a backbone, with the parameter names of its authors' detection models, as in SeeCoder's file.

Attention within windows of w × w cells, in every second block shifted by w/2 (Liu et al. 2021, sections 3.1 and 3.2):

    x ← x + join(Attention(cut(roll(pad(LN(x)))))),   x ← x + MLP(LN(x))

A map is padded before it is rolled, and maps no larger than a window are rolled too. (timm pads after rolling, so it
differs where the window does not divide the map.) Letters: N windows in an image, K = w² cells of a window,
M heads, d head width; maps are B H W C.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH_PX = 4
MASKED = -100.0  # added to the attention between cells that only rolling made neighbours


class SwinBackbone(nn.Module):
    """image_B3HW → one map_BCHW for each stage, the last one 32 times smaller than the image."""

    def __init__(self, width: int, depths: list[int], heads: list[int], window: int) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(len(depths))]
        self.patch_embed = PatchEmbedding(width)
        self.layers = nn.ModuleList(
            Stage(wide, depth, head, window, merges=wide != widths[-1])
            for wide, depth, head in zip(widths, depths, heads, strict=True)
        )
        for i, wide in enumerate(widths):
            self.add_module(f"norm{i}", nn.LayerNorm(wide))

    @classmethod
    def like(cls, state: dict[str, Tensor]) -> Self:
        """With the sizes of these weights."""
        blocks = [re.fullmatch(r"layers\.(\d+)\.blocks\.\d+\.norm1\.weight", name) for name in state]
        stages = [int(block[1]) for block in blocks if block]
        tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in sorted(set(stages))]
        return cls(
            width=len(state["patch_embed.proj.weight"]),
            depths=[stages.count(i) for i in sorted(set(stages))],
            heads=[table.shape[1] for table in tables],
            window=(math.isqrt(len(tables[0])) + 1) // 2,
        )

    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        x_BHWC, maps = self.patch_embed(image_B3HW), []
        stage: Any
        for i, stage in enumerate(self.layers):
            x_BHWC = stage(x_BHWC)
            maps.append(self.get_submodule(f"norm{i}")(x_BHWC).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x_BHWC = stage.downsample(x_BHWC)
        return maps


class PatchEmbedding(nn.Module):
    """Squares of four pixels → cells; black padding at the right and at the bottom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_PX, PATCH_PX)
        self.norm = nn.LayerNorm(width)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        height, width = image_B3HW.shape[-2:]
        padded = F.pad(image_B3HW, (0, -width % PATCH_PX, 0, -height % PATCH_PX))
        return self.norm(self.proj(padded).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks of one width, every second one shifted; ``downsample`` leads to the next stage."""

    def __init__(self, width: int, depth: int, heads: int, window: int, merges: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, window, shift=i % 2 * (window // 2)) for i in range(depth))
        self.downsample = PatchMerging(width) if merges else None

    def forward(self, x_BHWC: Tensor) -> Tensor:
        for block in self.blocks:
            x_BHWC = block(x_BHWC)
        return x_BHWC


class Block(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        layers = OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(layers)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = x_BHWC + self.attend(self.norm1(x_BHWC))
        return x_BHWC + self.mlp(self.norm2(x_BHWC))

    def attend(self, x_BHWC: Tensor) -> Tensor:
        height, width = x_BHWC.shape[1:3]
        padded = F.pad(x_BHWC, (0, 0, 0, -width % self.window, 0, -height % self.window))
        size, mask_NKK = padded.shape[1:3], None
        if self.shift:
            padded = padded.roll((-self.shift, -self.shift), (1, 2))
            mask_NKK = mask_rolled(size, self.window, self.shift).to(x_BHWC)
        made = join_windows(self.attn(cut_windows(padded, self.window), mask_NKK), size, self.window)
        return made.roll((self.shift, self.shift), (1, 2))[:, :height, :width]


class WindowAttention(nn.Module):
    """Attention within each window, with a learned bias per head and distance between two cells."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        self.register_buffer("relative_position_index", index_distances(window))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, windows_BNKC: Tensor, mask_NKK: Tensor | None) -> Tensor:
        query, key, value = self.qkv(windows_BNKC).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        bias = self.relative_position_bias_table[self.relative_position_index].movedim(-1, 0)
        if mask_NKK is not None:
            bias = bias + mask_NKK[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(attended.transpose(-3, -2).flatten(-2))


class PatchMerging(nn.Module):
    """Four neighbouring cells → one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        height, width = x_BHWC.shape[1:3]
        x_BHWC = F.pad(x_BHWC, (0, 0, 0, width % 2, 0, height % 2))
        # the neighbour below comes before the one to the right
        neighbours = [x_BHWC[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, -1)))


def cut_windows(x_BHWC: Tensor, window: int) -> Tensor:
    """A map whose sides the window divides → windows_BNKC, row by row."""
    return x_BHWC.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_windows(windows_BNKC: Tensor, size: torch.Size, window: int) -> Tensor:
    """The inverse of ``cut_windows`` for maps of this height and width."""
    rows, columns = (side // window for side in size)
    grid = windows_BNKC.unflatten(1, (rows, columns)).unflatten(3, (window, window))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def index_distances(window: int) -> Tensor:
    """The row of the bias table for each pair of cells of a window: index_KK."""
    cells = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    distance_KK2 = cells[:, None] - cells + window - 1
    return distance_KK2[..., 0] * (2 * window - 1) + distance_KK2[..., 1]


def mask_rolled(size: torch.Size, window: int, shift: int) -> Tensor:
    """What is added to the attention in a rolled map, so that cells from opposite borders do not attend: mask_NKK."""
    strips = []
    for side in size:
        position = torch.arange(side)
        strips.append((position >= side - window).int() + (position >= side - shift).int())
    region_HW = 3 * strips[0][:, None] + strips[1]
    region_NK = cut_windows(region_HW[None, :, :, None], window)[0, :, :, 0]
    return MASKED * (region_NK[:, :, None] != region_NK[:, None])
