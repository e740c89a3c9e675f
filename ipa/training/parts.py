"""The parts of a training from its configuration: checked for fit first, then built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from ipa.export.adapter_file import identify_file, make_head
from ipa.export.layouts import check_layout, check_same_sizes
from ipa.export.published import check_fits
from ipa.model import IPAdapterModel
from ipa.types import BaseWidths, EncoderWidths


def check_parts(cfg: DictConfig, begins: bool = True) -> None:
    """Raise UserError, before any weight is read, if the parts cannot be trained, initialised, or exported.

    Widths come from the configuration files and headers of base and encoder. A resumed run (``begins`` false)
    no longer needs ``adapter.init_from``.
    """
    base: BaseWidths = read_widths(cfg.base)
    encoder: EncoderWidths = read_widths(cfg.encoder)
    with torch.device("meta"):
        head = instantiate(cfg.tokens)(encoder, base.context)
    kind: str = get_class(cfg.adapter.make._target_).name  # type: ignore[attr-defined]
    check_layout(head, kind, cfg.callbacks.export.layout)
    if cfg.adapter.init_from and begins:
        path = Path(cfg.adapter.init_from)
        file = identify_file(path)
        check_fits(file, base, encoder, source=str(path), base=cfg.base.path, encoder=name_of(cfg.encoder))
        with torch.device("meta"):
            check_same_sizes(make_head(file), file.kind, head, kind, str(path))


def read_widths(part: DictConfig) -> Any:
    """The widths of a part as its class reads them, without loading it."""
    return instantiate({**part, "_target_": part._target_.replace("from_pretrained", "read_widths")})


def name_of(encoder: DictConfig) -> str:
    return encoder.get("name") or encoder.path


def build_model(cfg: DictConfig) -> IPAdapterModel:
    """Load the frozen parts and make the trainable ones, with the widths of the loaded objects."""
    family, encoder = instantiate(cfg.base), instantiate(cfg.encoder)
    head = instantiate(cfg.tokens)(encoder.widths, family.context_width)
    adapter = instantiate(cfg.adapter.make)(family.hosts())
    model = IPAdapterModel(family, encoder, head, adapter, cfg.min_snr_gamma, cfg.data.reference_fit)
    if cfg.gradient_checkpointing:
        model.checkpoint_gradients()
    if cfg.compile:
        model.compile_blocks()
    return model
