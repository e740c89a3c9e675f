"""Checkpoints that survive a kill at any moment: written beside, forced to disk, renamed; read without pickled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from ipa.checkpoint import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files with an atomic write; raises OSError when the disk is full, the old file stays."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_atomically(Path(path), lambda beside: torch.save(checkpoint, beside))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)
