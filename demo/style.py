"""Tells in which style a picture is drawn: a small network that only measures (figure "style" of measure.py adapter).

    python demo/style.py                       # a quarter of an hour on one core; writes demo/build/style.pt

The encoder is what is measured, and the judge has seen the held-out things. This one learns from the 1,186 others, and
is asked about the held-out ones.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange
from world import DEVICE, HERE, STYLE_WORDS, World, compose, draw_backgrounds, read_world, save_atomically

PATH = HERE / "build" / "style.pt"
STYLES = sorted(STYLE_WORDS)
STEPS, BATCH, PEAK_LR, SHIFT_PX = 4000, 64, 4e-3, 4


def make_network() -> nn.Sequential:
    widths = (3, 32, 64, 96)
    blocks = [block(one, other) for one, other in pairwise(widths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(widths[-1], len(STYLES))]
    return nn.Sequential(*blocks, *head)


def block(one: int, other: int) -> nn.Sequential:
    def layer(width: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(width, other, 3, stride, 1, bias=False), nn.BatchNorm2d(other), nn.ReLU()]

    return nn.Sequential(*layer(one, 2), *layer(other, 1))


@torch.no_grad()
def tell_style(network: nn.Module, pixels_B3HW: Tensor) -> list[str]:
    """Of pictures of 64 px with pixels in [-1, 1]."""
    network.eval()
    return [STYLES[number] for number in network(pixels_B3HW).argmax(1)]


def load_network() -> nn.Sequential | None:
    """The trained one; None where it was not made yet, which is told with the command that makes it."""
    if not PATH.is_file():
        print(f"no {PATH}: styles are not measured; `python demo/style.py` makes it", file=sys.stderr)
        return None
    network = make_network()
    network.load_state_dict(torch.load(PATH, weights_only=True, map_location="cpu"))
    return network.eval()


def augment(pixels_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """The batch mirrored or not, and shifted by some pixels."""
    if torch.rand((), generator=generator) < 0.5:
        pixels_B3HW = pixels_B3HW.flip(3)
    x, y = torch.randint(2 * SHIFT_PX + 1, (2,), generator=generator).tolist()
    size = pixels_B3HW.shape[-1]
    return F.pad(pixels_B3HW, (SHIFT_PX,) * 4, mode="replicate")[:, :, y : y + size, x : x + size]


def train(world: World, steps: int = STEPS) -> nn.Sequential:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    world = world.to(DEVICE)
    labels = torch.tensor([STYLES.index(style) for style in world.styles], device=DEVICE)
    network = make_network().to(DEVICE)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for _ in trange(steps, desc="style", mininterval=5):
        rows = torch.randint(len(world), (BATCH,), generator=generator)
        pixels = compose(world.rgba[rows], draw_backgrounds(BATCH, generator))
        loss = F.cross_entropy(network(augment(pixels, generator)), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.cpu()


def share_right(network: nn.Module, folder: Path) -> float:
    """Of a folder's real pictures; those with transparency lie on drawn backgrounds."""
    world = read_world(folder)
    pixels = compose(world.rgba, draw_backgrounds(len(world), torch.Generator().manual_seed(1)))
    told = tell_style(network, pixels)
    return sum(one == other for one, other in zip(told, world.styles, strict=True)) / len(world)


def main() -> None:
    network = train(read_world(HERE / "build" / "data" / "all"))
    save_atomically(network.state_dict(), PATH)
    print(f"right on held-out pictures: {share_right(network, HERE / 'data' / 'heldout'):.1%}", file=sys.stderr)


if __name__ == "__main__":
    main()
