"""Tiny encoders of every kind, on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_encoders import HALVES, TOWERS, save_clip_vision, save_tower, save_vision_model, save_whole_clip

from ipa.encoders.image_encoder import ImageEncoder
from ipa.types import to_unit_range

CROPPED = HALVES | {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
MAKERS: dict[str, Callable[[Path], str]] = {
    "clip": save_clip_vision,
    "whole_clip": save_whole_clip,
    "siglip": partial(save_vision_model, name="SiglipVision", preprocessing=HALVES),
    "dinov2": partial(save_vision_model, name="Dinov2", preprocessing=CROPPED),
    "registers": partial(
        save_vision_model, name="Dinov2WithRegisters", preprocessing=HALVES | {"size": {"height": 24, "width": 24}}
    ),
    **{name: partial(save_tower, vision=vision) for name, vision in TOWERS.items()},
}


class Sources(dict[str, str]):
    """Source of an encoder by its kind, as ``open_encoder`` takes it; made when it is first asked for."""

    def __init__(self, folder: Path, **made: str) -> None:
        super().__init__(**made)
        self.folder = folder

    def __missing__(self, name: str) -> str:
        torch.manual_seed(0)
        self[name] = MAKERS[name](self.folder / name)
        return self[name]


@pytest.fixture(autouse=True)
def _measured_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageEncoder, "_measure", ImageEncoder._measure.__wrapped__)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, clip_name: str) -> dict[str, str]:
    return Sources(tmp_path_factory.mktemp("encoders"), open_clip=clip_name)


@pytest.fixture(scope="session")
def image() -> Any:
    return to_unit_range(tiny.make_pictures(3, tiny.REFERENCE_PX))
